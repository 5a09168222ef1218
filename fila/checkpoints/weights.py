"""Reads a checkpoint's tensors: headers first, compared with an empty model, and only then the numbers.

transformers only warns where a checkpoint lacks a tensor or has one of another shape, and continues with random numbers
in its place, after it has allocated what the configuration asks for. Here names and shapes are compared on the meta
device, where nothing is allocated, and every difference is named. The tensors that were compared are handed over by
their open files, so that nothing is looked up a second time.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.core_model_loading import revert_weight_conversion

from fila.checkpoints.check import WEIGHTS_INDEX, Checkpoint, shown
from fila.checkpoints.quiet import quiet
from fila.configuration import FilaConfig
from fila.errors import is_out_of_memory, one_line
from fila.modeling import FilaForConditionalGeneration

# safetensors' names; other dtypes would be cast in silence.
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Parameters and numbers that a model may have beyond those stored: tied, or computed from the configuration.
SLACK = 1000
SLACK_NUMBERS = 2**24

# transformers switches the process's default dtype and initialisation while it loads.
_loading = threading.Lock()


class TooManyParameters(ValueError):
    """A configuration describes far more parameters than are stored."""


@contextmanager
def open_tensors(
    checkpoint: Checkpoint, dtypes: Collection[str] | None = tuple(STORED_DTYPES)
) -> Iterator[dict[str, Any]]:
    """The tensors of a checkpoint by name, as `safetensors` slices that are read when asked for.

    Args:
        dtypes: that may be stored, by safetensors' names; None for any.

    Raises:
        CheckpointError: a file is damaged, a dtype cannot be used, or files and index disagree on where a tensor is.
    """
    tensors: dict[str, Any] = {}
    homes: dict[str, list[str]] = {}
    with ExitStack() as files:
        for path in checkpoint.weights:
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_slice(name)
                    homes.setdefault(name, []).append(path.name)
            except (OSError, SafetensorError) as error:
                raise checkpoint.error(
                    f"expected a complete safetensors file {path.name}, got: {shown(one_line(error))}"
                ) from error
        faults = [
            f"tensor {shown(name)}: expected dtype {', '.join(dtypes or ())}, got {tensor.get_dtype()}"
            for name, tensor in sorted(tensors.items())
            if dtypes is not None and tensor.get_dtype() not in dtypes
        ]
        if checkpoint.index is not None:
            faults += [
                f"tensor {shown(name)}: expected it in {wanted or f'no file that {WEIGHTS_INDEX} names'}, "
                f"got it in {' and '.join(got) or 'no file'}"
                for name in sorted({*homes, *checkpoint.index})
                if (got := homes.get(name, [])) != [wanted := checkpoint.index.get(name, "")]
            ]
        if faults:
            raise checkpoint.error(*faults)
        yield tensors


def build_empty(checkpoint: Checkpoint, config: FilaConfig, num_tensors: int) -> FilaForConditionalGeneration:
    """The model of a configuration on the meta device; building stops where it outgrows the stored tensors.

    Raises:
        CheckpointError: the configuration describes no model, or a far larger one.
    """
    try:
        with quiet(), torch.device("meta"), _at_most(num_tensors + SLACK):
            return FilaForConditionalGeneration(config)
    except Exception as error:  # what a configuration can ask of other models' classes is open
        if is_out_of_memory(error):
            raise
        if isinstance(error, TooManyParameters):
            raise checkpoint.error(
                f"expected a configuration of at most {num_tensors + SLACK} tensors, {num_tensors} of them stored, "
                "got one of more"
            ) from error
        raise checkpoint.error(f"config.json does not describe a model: {shown(one_line(error))}") from error


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stops this thread from building a module of more parameters."""
    own, built = threading.get_ident(), 0

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal built
        if threading.get_ident() == own:
            built += 1
            if built > count:
                raise TooManyParameters

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compare(checkpoint: Checkpoint, model: FilaForConditionalGeneration, tensors: dict[str, Any]) -> None:
    """Refuses stored tensors that are not the model's, by names and shapes, all of them named.

    A tied tensor may be left out, or stored with the very numbers of the one it is tied to; it is then dropped from
    `tensors`.
    """
    stored = {name: tensor.get_shape() for name, tensor in tensors.items()}
    tied = model.all_tied_weights_keys
    own = model.state_dict()
    faults = differences(own, stored, tied)
    if faults:
        # Some language models are stored under other names, by which transformers finds them again.
        faults = min(faults, differences(revert_weight_conversion(model, dict(own)), stored, tied), key=len)
    numbers = sum(tensor.numel() for tensor in own.values()) + SLACK_NUMBERS
    faults += [
        f"{name}: expected a table that fits the weights, got one of {list(buffer.shape)}"
        for name, buffer in model.named_buffers()
        if name not in own and buffer.numel() > numbers
    ]
    if not faults:
        for name, source in tied.items():
            if name in tensors and source in tensors:
                if not torch.equal(tensors[name][...], tensors[source][...]):
                    faults.append(f"tensor {name}: expected the numbers of {source}, to which it is tied, got others")
                del tensors[name]
    if faults:
        raise checkpoint.error(*faults)


def differences(
    wanted: Mapping[str, torch.Tensor], stored: Mapping[str, Sequence[int]], tied: Mapping[str, str]
) -> list[str]:
    """The tensors that are misshaped, missing or unexpected."""
    either = {**tied} | {source: name for name, source in tied.items()}
    found = [
        f"tensor {name}: expected shape {list(wanted[name].shape)}, got {list(shape)}"
        for name, shape in sorted(stored.items())
        if name in wanted and list(wanted[name].shape) != list(shape)
    ]
    found += [
        f"tensor {name}: expected shape {list(tensor.shape)}, got no such tensor"
        for name, tensor in sorted(wanted.items())
        if name not in stored and either.get(name) not in stored
    ]
    return found + [
        f"tensor {shown(name)}: expected no such tensor, got one" for name in sorted(stored) if name not in wanted
    ]


def stored_dtype(config: FilaConfig, tensors: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the configuration names, else the one that most tensors have."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = [tensor.get_dtype() for tensor in tensors.values()]
    return STORED_DTYPES[max(STORED_DTYPES, key=names.count)]


def read_weights(
    checkpoint: Checkpoint, config: FilaConfig, tensors: dict[str, Any], dtype: torch.dtype
) -> FilaForConditionalGeneration:
    """The model with the tensors that were compared, on the CPU.

    transformers is given the tensors and no folder, so that it has no file to choose. They are read one by one from the
    mapped files; no second copy of the model is made.
    """
    try:
        with _loading, quiet():
            model, info = FilaForConditionalGeneration.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(f"its weights cannot be read: {shown(one_line(error))}") from error
    faults = [f"tensor {name}: expected it loaded, got it {kind}" for kind, names in _left(info) for name in names]
    faults += [] if faults else not_finite(model.named_parameters())
    if faults:
        raise checkpoint.error(*faults)
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    return model


def _left(info: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        yield kind.replace("_", " "), sorted(map(str, info[kind]))


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The tensors that hold NaN or infinity."""
    return [
        f"tensor {name}: expected finite numbers in {tensor.dtype}, got NaN or infinity"
        for name, tensor in tensors
        # One pass and no copy: both NaN and infinity reach the extremes.
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all()
    ]

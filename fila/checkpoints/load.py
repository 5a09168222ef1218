"""Strict loading: a folder to a model and its processor, complete or not at all.

`transformers` only warns where a checkpoint lacks a tensor or has one of another shape, and goes on with random numbers
in its place. Here every such thing is a `CheckpointError` that names the tensor, what was expected and what came.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from fila.configuration import FilaConfig
from fila.errors import is_out_of_memory, memory_for, one_line
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor
from fila_kernels import dispatch

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained" / "fila-nano"
HUB_PREFIX = "hf:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REQUIRED_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
STORED_DTYPES = ("F32", "F16", "BF16", "F64")  # as safetensors names them; others would be cast in silence
MOST_NAMED = 3  # tensors named in one message


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, what was expected and what came."""


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str | None = None,
) -> tuple[FilaForConditionalGeneration, FilaProcessor]:
    """Model and processor of a checkpoint, complete or not at all.

    Args:
        path: a folder written by `save_pretrained`; `hf:owner/name` for the Hugging Face hub (nothing else here uses a
            network); None for the `fila-nano` that is shipped with the package.
        device: "auto" (a CUDA device if there is one), or what `torch.device` takes.
        dtype: "auto" (float32 on a CPU, the checkpoint's own elsewhere), "float32", "bfloat16" or "float16".
        backend: of the CVFM, see `fila_kernels.dispatch.resolve`; None leaves it to the environment and the default.

    Raises:
        CheckpointError: a file is missing or damaged, another model's, or its tensors are not this model's.
        ValueError: device, dtype or backend cannot be had. RuntimeError: a backend asked for by name cannot run.
        MemoryError: the model does not fit.
    """
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    dispatch.resolve(backend)
    name, source, options = _locate(path)
    config = _load_config(name, source, options)
    with quiet(), memory_for("the model"):
        try:
            model, info = FilaForConditionalGeneration.from_pretrained(
                source,
                config=config,
                dtype=chosen_dtype,
                output_loading_info=True,
                # Collected like the missing ones, and refused below; with False a report is all one sees.
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                **options,
            )
        except Exception as error:  # an index may name anything
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"checkpoint {name}: its weights cannot be read: {one_line(error)}") from error
        _refuse_wrong_tensors(name, model, info)
        processor = _load_processor(name, source, options, config)
        for fusion in model.model.vision_tower.fusion:
            fusion.backend = backend
        return model.to(chosen_device).eval(), processor


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name, which has to be here.

    Raises:
        ValueError: an unknown name, or a device this machine or this build of torch does not have.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    if device == "auto":
        return torch.device("cuda" if "cuda" in here else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, {' or '.join(here)}, got {str(device)!r}") from error
    count = torch.accelerator.device_count() if found.type != "cpu" else 1
    if found.type not in here or (found.index or 0) >= count:
        built = "" if torch.version.cuda or found.type != "cuda" else " (this build of torch is for CPUs only)"
        raise ValueError(f"device: expected one that is here ({', '.join(here)}), got {str(device)!r}{built}")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """The dtype to load in, "auto" standing for the checkpoint's own.

    Raises:
        ValueError: an unknown name, or float16 on a CPU, whose float16 products are some hundred times slower.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {str(dtype)!r}")
    if found == torch.float16 and device.type == "cpu":
        raise ValueError("dtype: expected float32 or bfloat16 on a CPU, got 'float16', which CPUs compute very slowly")
    assert found is not None
    return found


def _locate(path: str | Path | None) -> tuple[str, str, dict[str, Any]]:
    """A name for messages, what `from_pretrained` takes, and its options: a local folder never reaches a network."""
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        return path, path.removeprefix(HUB_PREFIX), {}
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        if path is None:
            raise CheckpointError(
                f"expected the shipped checkpoint at {folder}, got nothing there; name another folder"
            )
        got = "a file" if folder.exists() else "nothing there"
        hint = (
            f"; {HUB_PREFIX}{path} would fetch it from the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        )
        raise CheckpointError(f"checkpoint {path}: expected a folder, got {got}{hint}")
    for file in REQUIRED_FILES:
        if not (folder / file).is_file():
            raise CheckpointError(f"checkpoint {folder}: expected a file {file}, got none")
    if (folder / GENERATION).is_file():
        # transformers goes on without one it cannot read, and so without the tokens that end an answer.
        try:
            with quiet():
                GenerationConfig.from_dict({**json.loads((folder / GENERATION).read_text())})
        except Exception as error:  # nothing there is checked for its type
            raise CheckpointError(f"checkpoint {folder}: {GENERATION} cannot be read: {one_line(error)}") from error
    for weights in _weight_files(folder):
        try:
            with safe_open(weights, framework="pt") as tensors:
                stored = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {folder}: expected a complete safetensors file {weights.name}, got: {one_line(error)}"
            ) from error
        _refuse(
            str(folder),
            [
                f"tensor {key}: expected dtype {', '.join(STORED_DTYPES)}, got {dtype}"
                for key, dtype in sorted(stored.items())
                if dtype not in STORED_DTYPES
            ],
        )
    return str(folder), str(folder), {"local_files_only": True}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"checkpoint {folder}: expected a file {WEIGHTS} or {WEIGHTS_INDEX}, got neither")
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {WEIGHTS_INDEX} cannot be read: {one_line(error)}") from error
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(f"checkpoint {folder}: {WEIGHTS_INDEX}: expected names of files, got {name!r}")
    return [folder / name for name in names]


def _load_config(name: str, source: str, options: dict[str, Any]) -> FilaConfig:
    local = Path(source) / "config.json"
    try:
        # Not all versions of transformers look whether it holds an object.
        found = json.loads(local.read_text()) if local.is_file() else {}
        if isinstance(found, dict):
            found, _ = PreTrainedConfig.get_config_dict(source, **options)
    except Exception as error:
        raise CheckpointError(f"checkpoint {name}: config.json cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {name}: config.json: expected an object, got {type(found).__name__}")
    if found.get("model_type") != "fila":
        raise CheckpointError(f'checkpoint {name}: expected model_type "fila", got {found.get("model_type")!r}')
    if found.get("quantization_config") is not None:
        # transformers ignores methods it does not know, and needs further packages for those it does.
        got = found["quantization_config"]
        method = got.get("quant_method") if isinstance(got, dict) else got
        raise CheckpointError(
            f"checkpoint {name}: expected weights that are not quantized, got quant_method {method!r}"
        )
    try:
        return FilaConfig.from_dict(found)
    except Exception as error:  # strict dataclasses and nested configurations raise nearly anything
        raise CheckpointError(f"checkpoint {name}: config.json does not describe a model: {one_line(error)}") from error


def _load_processor(name: str, source: str, options: dict[str, Any], config: FilaConfig) -> FilaProcessor:
    try:
        processor = FilaProcessor.from_pretrained(source, **options)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        images = prompt.count(processor.image_token)
    except Exception as error:  # tokenizer files have many ways of being wrong
        raise CheckpointError(f"checkpoint {name}: its processor cannot be made: {one_line(error)}") from error
    if images != 1 or "What?" not in prompt:
        raise CheckpointError(
            f"checkpoint {name}: expected a chat template that gives the question and one {processor.image_token}, "
            f"got {one_line(repr(prompt))[:200]}"
        )
    wanted, got = config.vision_config.geometry(), processor.image_processor.geometry
    if wanted != got:
        raise CheckpointError(f"checkpoint {name}: expected a processor for the model's {wanted}, got one for {got}")
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"checkpoint {name}: expected a tokenizer with an image token of id {config.image_token_id}, "
            f"got {processor.image_token_id}"
        )
    embeddings, tokens = config.text_config.vocab_size, len(processor.tokenizer)
    if tokens > embeddings:
        raise CheckpointError(f"checkpoint {name}: expected a tokenizer of at most {embeddings} tokens, got {tokens}")
    return processor


def _refuse_wrong_tensors(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    found = [
        f"tensor {key}: expected shape {list(wanted)}, got {list(got)}"
        for key, got, wanted in sorted(info["mismatched_keys"])
    ]
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    found += [
        f"tensor {key}: expected shape {shapes.get(key, 'of the model')}, got no such tensor"
        for key in sorted(set(info["missing_keys"]) - mismatched)
    ]
    found += [f"tensor {key}: expected no such tensor, got one" for key in sorted(info["unexpected_keys"])]
    found += [one_line(message) for message in info["error_msgs"]]
    found += [
        f"tensor {key}: expected finite numbers, got NaN or infinity"
        for key, tensor in model.named_parameters()
        if key.endswith(".alpha") and not found and not torch.isfinite(tensor).all()
    ]
    _refuse(name, found)


def _refuse(name: str, found: list[str]) -> None:
    """Raises what was found wrong, if anything was; the first few by name."""
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise CheckpointError(f"checkpoint {name}: {'; '.join(found[:MOST_NAMED])}{more}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' reports and progress bars; what they would say is checked here and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

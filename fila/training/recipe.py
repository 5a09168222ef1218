"""Reads a recipe: a YAML file of a training run, checked to the last key before anything is built.

    model, data, optimizer, run    one section each; the classes below list every key with its default

`key=value` on the command line replaces an entry: `optimizer.rate=1e-4`, `data.sources=[{path: pages.jsonl}]`. An
unknown key is refused with the nearest valid one. Paths are taken from the folder in which the command runs.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fila.training.errors import TrainingError

# Parts of the model that can be trained, and the parameters of each.
PARTS = {
    "vit": ("model.vision_tower.vit.",),
    "convnext": ("model.vision_tower.convnext.",),
    "fusion": ("model.vision_tower.fusion.",),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "language_model": ("model.language_model.", "lm_head."),
}
# transformers' implementations that keep the records of a packed row apart (by position ids that restart).
ATTENTION_FOR_PACKING = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


@dataclass(frozen=True)
class ModelPart:
    """`model`: what is trained.

    Attributes:
        checkpoint: a folder written by `save_pretrained` or by `fila assemble`; None for fila-nano as shipped.
        fresh: begin with new weights of that configuration, drawn from `run.seed`.
        vision: settings of `FilaVisionConfig` to change that no weight depends on (`high_res_rule`, `high_res_size`,
            `image_grid_pinpoints`).
        attention: the implementation in every part.
        trains: parts that learn (`PARTS`), or "all"; the others stay frozen, and in eval mode.
        gradient_checkpointing: of ViT, ConvNeXt and language model, without reentrance.
        recompute: the fusions save no intermediate tensor.
    """

    checkpoint: str | None = None
    fresh: bool = False
    vision: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    trains: list[str] = field(default_factory=lambda: ["all"])
    gradient_checkpointing: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class SourcePart:
    """An entry of `data.sources`: a corpus, its share, and the folder that names of pictures start from."""

    path: str
    weight: float | None = None
    images: str | None = None


@dataclass(frozen=True)
class DataPart:
    """`data`: what is learned.

    Attributes:
        sources: corpora; shares (`weight`) of all or of none, else in proportion to their sizes.
        length: tokens of a row; a longer record counts as broken.
        packing: whether records share a row; else each has a row of its own, padded to the longest of its micro-batch.
        rows: rows of one step over all processes; a multiple of their number.
        micro_batch: without packing, records in one forward pass.
        workers: processes per process that decode and draw pictures.
        broken: "skip" leaves a broken record out, counts it and lists it in `broken.txt`; "stop" ends the run.
    """

    sources: list[SourcePart] = field(default_factory=list)
    length: int = 8192
    packing: bool = True
    rows: int = 8
    micro_batch: int = 1
    workers: int = 4
    broken: Literal["skip", "stop"] = "skip"


@dataclass(frozen=True)
class OptimizerPart:
    """`optimizer`: AdamW.

    Attributes:
        rate: peak learning rate.
        rates: factors on it, by part (`PARTS`) or "alpha", the gates.
        decay: weight decay of everything but vectors, gates and embeddings.
        schedule: after the warm-up.
        warmup: share of the steps.
        clip: largest norm of the gradient.
    """

    rate: float = 2e-5
    rates: dict[str, float] = field(default_factory=dict)
    decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.03
    clip: float = 1.0


@dataclass(frozen=True)
class RunPart:
    """`run`: where, how long, on what.

    Attributes:
        folder: the run's own; a run that is started again there goes on from its last whole checkpoint.
        precision: float32, or bfloat16: weights and optimizer in float32, products in bfloat16.
        parallel: of several processes: "ddp", or "fsdp" (FSDP2).
        reshard: under fsdp, whether gathered weights are freed after the forward pass.
        save_every, keep: steps between checkpoints, and how many stay.
        log_every: steps between lines of progress; `log.jsonl` has every step.
        peak_tflops: of one device, for the model FLOPs utilisation; known for some GPUs.
        device: "auto" or "cpu".
    """

    folder: str = "runs/fila"
    steps: int = 1000
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    reshard: bool = True
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    peak_tflops: float | None = None
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    run: RunPart = field(default_factory=RunPart)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with `key=value` overrides.

    Raises:
        TrainingError: no such file, not YAML, an unknown key, a value of another type, or settings that do not fit.
    """
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: expected YAML, got: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise TrainingError(f"expected key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise TrainingError(f"{override}: expected a YAML value, got: {error}") from error
        _put(fields, key.split("."), value)
    recipe = make(Recipe, fields, path.name)
    check(recipe)
    return recipe


def _put(fields: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = fields.get(key)
        fields[key] = dict(inner) if isinstance(inner, Mapping) else {}
        fields = fields[key]
    fields[keys[-1]] = value


def make(kind: type, fields: Any, place: str) -> Any:
    """An object of a dataclass from a mapping, every key known and every value of its type."""
    if not isinstance(fields, Mapping):
        raise TrainingError(f"{place}: expected keys and values, got {fields!r:.80}")
    known = typing.get_type_hints(kind)
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise TrainingError(f"{place}: unknown key {key!r}; the nearest is {near!r}")
    try:
        return kind(**{key: _value(known[key], value, f"{place}: {key}") for key, value in fields.items()})
    except TypeError as error:
        raise TrainingError(f"{place}: {error}") from error


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, place)
    if dataclasses.is_dataclass(kind):
        return make(kind, value, place)  # type: ignore[arg-type]
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-5 for a text
        except ValueError:
            pass
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    names = f"one of {', '.join(map(str, arguments))}" if origin is Literal else str(getattr(kind, "__name__", kind))
    raise TrainingError(f"{place}: expected {names}, got {value!r:.80}")


def check(recipe: Recipe) -> None:
    """Refuses numbers that no run can have and settings that do not fit each other."""
    model, data, optimizer, run = recipe.model, recipe.data, recipe.optimizer, recipe.run
    for name, number, least in (
        ("data.length", data.length, 1),
        ("data.rows", data.rows, 1),
        ("data.micro_batch", data.micro_batch, 1),
        ("data.workers", data.workers, 0),
        ("run.steps", run.steps, 1),
        ("run.seed", run.seed, 0),
        ("run.save_every", run.save_every, 1),
        ("run.keep", run.keep, 1),
        ("run.log_every", run.log_every, 1),
        ("optimizer.decay", optimizer.decay, 0),
        ("optimizer.warmup", optimizer.warmup, 0),
    ):
        if not (number >= least and math.isfinite(number)):
            raise TrainingError(f"{name}: expected {least} or more, got {number}")
    for name, number in (("optimizer.rate", optimizer.rate), ("optimizer.clip", optimizer.clip)):
        if not (number > 0 and math.isfinite(number)):
            raise TrainingError(f"{name}: expected a positive number, got {number}")
    if optimizer.warmup > 1:
        raise TrainingError(f"optimizer.warmup: expected a share of the steps, 0 to 1, got {optimizer.warmup}")
    _names("model.trains", model.trains, [*PARTS, "all"])
    _names("optimizer.rates", optimizer.rates, [*PARTS, "alpha"])
    _names("model.vision", model.vision, ["high_res_rule", "high_res_size", "image_grid_pinpoints"])
    if not model.trains:
        raise TrainingError(f"model.trains: expected parts that learn, out of {', '.join(PARTS)}, got none")
    if not data.sources:
        raise TrainingError("data.sources: expected at least one corpus, got none")
    weights = [source.weight for source in data.sources]
    if None in weights and any(weight is not None for weight in weights):
        raise TrainingError(f"data.sources: expected a weight for every corpus or for none, got {weights}")
    if data.packing and model.attention not in ATTENTION_FOR_PACKING:
        raise TrainingError(
            f"data.packing: expected an attention that keeps records apart ({', '.join(ATTENTION_FOR_PACKING)}), "
            f"got model.attention {model.attention!r}"
        )
    if data.packing and data.micro_batch != 1:
        raise TrainingError(
            f"data.micro_batch: a packed micro-batch is one row, got {data.micro_batch}; set data.length"
        )
    if not data.packing and data.rows % data.micro_batch:
        raise TrainingError(f"data.rows: expected a multiple of data.micro_batch {data.micro_batch}, got {data.rows}")


def _names(place: str, given: Any, known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0)[0]
            raise TrainingError(f"{place}: unknown name {name!r}; the nearest is {near!r}")


def passes(recipe: Recipe, processes: int) -> int:
    """Forward passes of a step in one process.

    Raises:
        TrainingError: the processes cannot share a step's rows.
    """
    at_once = recipe.data.rows // recipe.data.micro_batch
    if at_once % processes:
        raise TrainingError(f"data.rows: expected a multiple of {processes} processes, got {at_once} passes a step")
    return at_once // processes

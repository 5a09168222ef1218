"""Builds what a recipe names: the model, frozen and prepared, its processor, and the corpus."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fila.checkpoints.load import load
from fila.image_processing import FilaImageProcessor
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor
from fila.training.data.conversation import Encoder
from fila.training.data.order import Order
from fila.training.data.packing import Corpus
from fila.training.data.sources import Source, open_source
from fila.training.errors import TrainingError
from fila.training.recipe import PARTS, Recipe


def build_model(recipe: Recipe) -> tuple[FilaForConditionalGeneration, FilaProcessor]:
    """The model that a recipe trains, on the CPU in float32, and its processor.

    Raises:
        ValueError: the checkpoint cannot be loaded, or settings do not fit it.
    """
    wanted = recipe.model
    model, processor = load(wanted.checkpoint, device="cpu", dtype="float32")
    config = model.config
    if wanted.fresh:
        torch.manual_seed(recipe.run.seed)
        model = FilaForConditionalGeneration(config)
    for name, value in wanted.vision.items():
        setattr(config.vision_config, name, value)
    config.check()
    processor = with_geometry(processor, model)
    try:
        model.set_attn_implementation(wanted.attention)
    except (ImportError, ValueError) as error:
        raise TrainingError(f"model.attention: {error}") from error
    if recipe.data.length > config.text_config.max_position_embeddings and not recipe.data.packing:
        raise TrainingError(
            f"data.length: expected at most the language model's {config.text_config.max_position_embeddings} "
            f"positions, got {recipe.data.length}"
        )
    prepare(model)
    freeze(model, wanted.trains)
    for fusion in model.model.vision_tower.fusion:
        if wanted.recompute and not hasattr(fusion, "recompute"):
            raise TrainingError(f"model.recompute: expected fusions that can, got {type(fusion).__name__}")
        if wanted.recompute:
            fusion.recompute = True
    if wanted.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor


def with_geometry(processor: FilaProcessor, model: FilaForConditionalGeneration) -> FilaProcessor:
    """The processor that draws what the model's configuration says."""
    geometry = model.config.vision_config.geometry()
    old = processor.image_processor
    if old.geometry == geometry:
        return processor
    placed = {
        "tile_size", "patch_size", "high_res_stride", "image_grid_pinpoints", "high_res_rule", "high_res_size",
    }  # fmt: skip
    others = {name: getattr(old, name) for name in old._settings() if name not in placed}
    image_processor = FilaImageProcessor.from_geometry(geometry, **others)
    return FilaProcessor(image_processor, processor.tokenizer, chat_template=processor.chat_template)


def prepare(model: PreTrainedModel) -> None:
    """Sets what packed rows need: transformers keeps their records apart only where the text model caches nothing."""
    model.config.text_config.use_cache = False


def parts_named(trains: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the names of parameters that learn."""
    return tuple(prefix for part in (PARTS if "all" in trains else trains) for prefix in PARTS[part])


def freeze(model: nn.Module, trains: Iterable[str]) -> None:
    """Leaves gradients on for the parts that learn, off for the rest.

    Raises:
        TrainingError: a part that this model does not have, such as the fusions of a model without one.
    """
    trains = list(trains)
    learning = parts_named(trains)
    names = [name for name, _ in model.named_parameters()]
    for part in trains:
        if part != "all" and not any(name.startswith(PARTS[part]) for name in names):
            raise TrainingError(f"model.trains: expected parts that the model has, got {part!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learning))


def modules_at_rest(model: nn.Module) -> list[nn.Module]:
    """Modules whose parameters are all frozen: they stay in eval mode, as they were when they were trained.

    Of a layer that recomputes its activations, only what is inside: its own flag says whether it recomputes.
    """

    def frozen(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    found = {inner for module in model.modules() if frozen(module) for inner in module.modules()}
    return [module for module in found if not getattr(module, "gradient_checkpointing", False)]


def rest(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = False


def open_sources(recipe: Recipe) -> list[Source]:
    """A recipe's corpora, opened; `TrainingError` where one cannot be."""
    return [open_source(Path(s.path), Path(s.images) if s.images else None) for s in recipe.data.sources]


def build_corpus(recipe: Recipe, sources: Sequence[Source], processor: FilaProcessor) -> Corpus:
    """The mixture of a recipe's sources, encoded for a processor's model."""
    data = recipe.data
    weights = [source.weight for source in data.sources if source.weight is not None]
    order = Order([len(s) for s in sources], [s.groups for s in sources], weights or None, recipe.run.seed)
    return Corpus(sources, order, Encoder(processor), data.length, data.broken == "stop")


def pad_id_of(processor: Any) -> int:
    """The id that fills rows; never learned, and never looked back at."""
    tokenizer = processor.tokenizer
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

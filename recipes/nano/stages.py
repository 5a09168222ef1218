"""Defines the stages of training: what runs, what learns, what stays frozen.

    text     stage 0: the language model answers questions about pages given as text on a grid (nothing is pretrained)
    vision   stage 0: the hybrid tower and the projector learn the character map of a page, and the tokens of `text`
    align    stage 1 of the paper: no cropping; only the projector and the fusion layers learn, the rest is frozen
    tune     stage 2 of the paper: dynamic cropping, all parameters

The two halves of stage 0 stand in for the pretrained towers the paper starts from. In `text`, a page reaches the
language model as the tokens a perfect encoder might make: for each patch the sum of its characters' own embeddings,
turned by one matrix per slot, and of its place in the tile. Those tokens are then what `vision` aims at.

Shapes: V views, N patches a view, D the ViT's width, S slots a patch, K `NUM_CLASSES`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fila.configuration import FilaConfig
from fila.modeling import FilaForConditionalGeneration
from fila.vision import ViewGroup, group_views
from recipes.nano.data import (
    COVER,
    HELD,
    IGNORE,
    NUM_CLASSES,
    SLOTS,
    PageBatch,
    view_labels,
)
from recipes.nano.guidance import Guidance
from recipes.nano.pages.sample import CHARSET, SHAPES
from recipes.nano.tokenizer import VOCABULARY

EMPTY_WEIGHT = 0.1  # of a patch without characters in the dense loss: most have none


@dataclass(frozen=True)
class Stage:
    """One stage's recipe.

    Args:
        steps, batch: optimiser steps, pages per step.
        lr: peak learning rate; alpha has ten times as much and no decay.
        trains: parts that learn, by the first words of their parameters' names.
        cropping: False for the rule "direct".
        dense: weight of the losses on tokens and maps, at the start and at the end. In `tune` the gradients of the
            answers are some twenty times as large in the tower.
        shares: kinds of pages and how often each comes, see `recipes.nano.pages.sources`.
        absent: share of the questions that ask for what the page does not hold. `text` first has to find what is there.
    """

    steps: int
    batch: int
    lr: float
    trains: tuple[str, ...]
    cropping: bool = True
    dense: tuple[float, float] = (0.0, 0.0)
    warmup: int = 100
    shares: dict[str, float] = field(default_factory=lambda: {"cards": 1.0})
    absent: float = 0.0


STAGES = {
    "text": Stage(
        3200,
        8,
        2e-3,
        ("model.language_model", "lm_head", "model.image_newline", "grid_text"),
        shares={"cards": 0.4, "dense": 0.2, "documents": 0.4},
    ),
    "vision": Stage(
        1300,
        8,
        2e-3,
        ("model.vision_tower", "model.multi_modal_projector", "heads"),
        dense=(1, 1),
        shares={"cards": 0.3, "dense": 0.2, "documents": 0.5},
    ),
    "align": Stage(
        400,
        8,
        2e-3,
        ("model.multi_modal_projector", "model.vision_tower.fusion", "heads"),
        cropping=False,
        dense=(1, 1),
        warmup=30,
    ),
    "tune": Stage(1400, 8, 1.8e-3, ("",), dense=(15, 15), shares={"cards": 0.6, "documents": 0.4}, absent=0.08),
}


class CharacterHeads(nn.Module):
    """Linear read-outs of the character map: from the ViT's tokens and from each ConvNeXt stage coarse enough for it.

    They serve training only and are not part of the exported model.
    """

    def __init__(self, config: FilaConfig):
        super().__init__()
        vision = config.vision_config
        patch, strides = vision.patch_size, vision.convnext_strides
        self.tokens = nn.Linear(vision.hidden_size, SLOTS * NUM_CLASSES)
        self.maps = nn.ModuleDict()
        for stage, (stride, width) in enumerate(zip(strides, vision.convnext_config.hidden_sizes, strict=True)):
            cell = stride * patch // strides[-1]  # canvas pixels a cell covers
            if cell in (COVER, patch):
                self.maps[str(stage)] = nn.Linear(width, (1 if cell == COVER else HELD) * NUM_CLASSES)


class GridText(nn.Module):
    """Stage 0's stand-in for an encoder: a page of characters as tokens, [V, N, S] classes to [V, N, text width]."""

    def __init__(self, config: FilaConfig):
        super().__init__()
        width = config.text_config.hidden_size
        std = config.text_config.initializer_range
        # The first slot starts as the identity: a character on the page then looks like the same character in a text,
        # which makes copying easy to find. The others start near it.
        self.turn = nn.Parameter(torch.eye(width) + 0.5 * torch.randn(SLOTS, width, width) * width**-0.5)
        self.turn.data[0] = torch.eye(width)
        self.shapes = nn.Parameter(torch.randn(len(SHAPES), width) * std)
        self.base = nn.Parameter(torch.randn(width) * std)
        self.place = nn.Parameter(torch.randn(config.image_seq_length, width) * 0.4 * std)
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor([VOCABULARY[char] for char in [*CHARSET, " "]]), persistent=False)

    def forward(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """`embedding` [vocabulary, text width] is the language model's own."""
        empty = embedding.new_zeros(1, embedding.shape[1])
        table = torch.cat([empty, embedding[self.ids], self.shapes]) @ self.turn  # [S, K, width]
        slots = torch.arange(len(self.turn), device=labels.device)
        return table[slots, labels.clamp(min=0)].sum(-2) + self.base + self.place


class Trainee(nn.Module):
    """The model with the helpers that only training needs; returns one stage's losses for a batch.

    Attributes:
        has_target: whether `grid_text` has learned the tokens that the loss "grid" aims at; without, it is left out.
    """

    def __init__(self, model: FilaForConditionalGeneration):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.heads = CharacterHeads(model.config)
        self.grid_text = GridText(model.config)
        self.has_target = True
        self._export = [model]  # in a list, so that its parameters are not registered twice

    @property
    def export(self) -> FilaForConditionalGeneration:
        """The model alone, as users load it."""
        return self._export[0]

    def freeze(self, stage: Stage, frozen: tuple[str, ...] = ()) -> None:
        """Leaves gradients on for what the stage trains, off for the rest and for the parts named in `frozen`."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trains))
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied weight has two names
            if name.startswith(frozen):
                parameter.requires_grad_(False)

    def forward(self, name: str, batch: PageBatch) -> dict[str, Tensor]:
        """Losses of a stage by name, unweighted: "answer", "tokens", "grid", "map2", "map3", and those of `HEADS`."""
        if name == "text":
            return self._answer(batch, self.grid_features(batch))
        if name == "vision":
            return self._vision(batch)
        model, tower = self.export, self.export.model.vision_tower
        images = {k: batch.inputs[k] for k in ("pixel_values", "image_sizes", "high_res_pixel_values")}
        maps: list[list[Tensor]] = []
        projected: list[Tensor] = []
        with (
            tower.convnext.register_forward_hook(lambda module, args, out: maps.extend(out)),
            model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: projected.append(out)),
        ):
            features = model.get_image_features(**images)
        losses = self._answer(batch, features)
        labels = torch.cat([view_labels(c, layout) for c, layout in zip(batch.characters, batch.layouts, strict=True)])
        losses["tokens"] = dense_loss(self.heads.tokens(features.last_hidden_state[:, 1:]), labels)
        if self.has_target:
            losses["grid"] = self._grid_loss(projected[0], labels)
        return losses if name == "align" else losses | self._map_losses(maps, batch)

    def _answer(self, batch: PageBatch, features: BaseModelOutputWithPooling) -> dict[str, Tensor]:
        """Loss of the answers, and of the heads that are told where to look."""
        # No attention mask: texts are padded on the right, where causal attention never looks back from.
        with Guidance(self.export.model.language_model) as guidance:
            outputs = self.export(
                input_ids=batch.inputs["input_ids"], labels=batch.labels, mm_encoder_outputs={"image": features}
            )
        return {"answer": outputs.loss} | guidance.losses(batch.guides)

    def grid_features(self, batch: PageBatch) -> BaseModelOutputWithPooling:
        """The pages as grid text, in the form in which the encoder gives pictures."""
        model = self.export.model
        labels = [view_labels(c, layout) for c, layout in zip(batch.characters, batch.layouts, strict=True)]
        views = self.grid_text(torch.cat(labels), model.get_input_embeddings().weight).split([len(v) for v in labels])
        features, _ = model.pack_image_features(
            list(views), batch.inputs["image_sizes"].tolist(), "default", model.image_newline
        )
        return BaseModelOutputWithPooling(pooler_output=features)

    def _vision(self, batch: PageBatch) -> dict[str, Tensor]:
        """Losses of the tower on characters, maps and stage 0's tokens, without the global view: it is unreadable."""
        tower = self.export.model.vision_tower
        labels = [view_labels(c, layout)[1:] for c, layout in zip(batch.characters, batch.layouts, strict=True)]
        pixels, high_res = batch.inputs["pixel_values"], batch.inputs["high_res_pixel_values"]
        groups = [without_global(g) for g in group_views(batch.layouts, tower.config.convnext_strides, pixels.device)]
        order = [i for group in groups for i in group.images]
        tiles = torch.cat([pixels[i, 1 : batch.layouts[i].num_views] for i in order])
        rasters = [high_res[g.images, :, : g.raster[0], : g.raster[1]] for g in groups]
        maps: list[list[Tensor]] = []
        with tower.convnext.register_forward_hook(lambda module, args, out: maps.extend(out)):
            x = tower.encode(tiles, rasters, groups)
        wanted = torch.cat([labels[i] for i in order])
        losses = {"tokens": dense_loss(self.heads.tokens(x[:, 1:]), wanted)}
        if self.has_target:
            losses["grid"] = self._grid_loss(self.export.model.multi_modal_projector(x[:, 1:]), wanted)
        return losses | self._map_losses(maps, batch)

    def _grid_loss(self, projected: Tensor, labels: Tensor) -> Tensor:
        """The distance of projected tokens from those the language model learned to read in stage 0; zeros score 1.

        It hands stage 0's two halves to each other; without it the projector has only the answers to learn from.
        """
        with torch.no_grad():
            target = self.grid_text(labels, self.export.get_input_embeddings().weight).float()
        weight = torch.where(labels.amax(-1) > 0, 1.0, EMPTY_WEIGHT) * (labels[..., 0] != IGNORE)
        error = (projected.float() - target).square().mean(-1)
        return (weight * error).sum() / (weight * target.square().mean(-1)).sum()

    def _map_losses(self, maps: list[list[Tensor]], batch: PageBatch) -> dict[str, Tensor]:
        """Character-map losses of the ConvNeXt's stages; `maps` holds every group's, as the encoder made them."""
        config = self.export.config.vision_config
        groups = group_views(batch.layouts, config.convnext_strides, torch.device("cpu"))
        losses = {}
        for stage, head in self.heads.maps.items():
            cell = config.convnext_strides[int(stage)] * config.patch_size // config.convnext_strides[-1]
            wanted = [
                batch.coverage[i].unsqueeze(-1) if cell == COVER else batch.characters[i][..., :HELD]
                for group in groups
                for i in group.images
            ]
            logits = torch.cat([head(features[int(stage)]).flatten(0, -2) for features in maps])
            losses[f"map{stage}"] = dense_loss(logits, torch.cat([w.flatten(0, -2) for w in wanted]))
        return losses


def without_global(group: ViewGroup) -> ViewGroup:
    """The group with its tiles alone."""
    image = group.image_index
    tiles = torch.cat([image.new_zeros(1), image[1:] - image[:-1]]) == 0
    tiles[0] = False
    return ViewGroup(group.images, group.raster, [box[tiles] for box in group.boxes], image[tiles])


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the character map: logits [..., S * K], labels [..., S]; `IGNORE` where nothing is asked."""
    labels = labels.reshape(-1, labels.shape[-1])
    weight = torch.where(labels.amax(-1, keepdim=True) > 0, 1.0, EMPTY_WEIGHT) * (labels != IGNORE)
    logits = logits.float().reshape(-1, NUM_CLASSES)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return (loss * weight.flatten()).sum() / weight.sum()

"""Defines the fusions: the modules between ViT layers that add to the tiles' tokens what the ConvNeXt saw.

The configuration's `fusion` names an entry of `FUSIONS`, and the encoder builds one module of it per entry of
`fusion_layers`. Each module is called after its ViT layer, once per group of pictures of one canvas size:

    tokens = module(tokens, maps, boxes, image_index)

    tokens       [T, 1 + N, D], the class token and the patch tokens of every view in the group
    maps         each ConvNeXt stage's map, shallowest first: [B, h/s, w/s, C], channels last
    boxes        for each stage, [T, 4] float32: the region of every view on that stage's map, in cells
    image_index  [T] int32, the picture within the group that each view came from

To add a fusion, derive it from `Fusion` and enter its builder in `FUSIONS`.

Source: FILA (arXiv 2412.08378), section 3.3.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from fila.configuration import FilaVisionConfig
from fila_kernels import CVFM

# Called with each fusion, its input and its output; of the thread or task that set it, so that models stay shareable.
Watcher = Callable[[Any, Tensor, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Shows `watcher` every fusion that this thread computes inside the block, whichever model it belongs to."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Fusion(nn.Module):
    """The interface that the encoder knows: a call as above, and the weights that training starts from."""

    def forward(self, tokens: Tensor, maps: Sequence[Tensor], boxes: Sequence[Tensor], image_index: Tensor) -> Tensor:
        raise NotImplementedError

    def init_fresh(self) -> None:
        """Sets the weights that training starts from, through `transformers.initialization`."""
        raise NotImplementedError


class DeepFusion(CVFM, Fusion):
    """The paper's fusion at one depth: the CVFM, reading the map of one ConvNeXt stage."""

    def __init__(self, config: FilaVisionConfig, stage: int):
        channels = config.convnext_config.hidden_sizes[stage]
        super().__init__(config.hidden_size, channels, config.fusion_hidden_size, gate=config.fusion_gate)
        self.stage = stage

    def forward(  # type: ignore[override]
        self, tokens: Tensor, maps: Sequence[Tensor], boxes: Sequence[Tensor], image_index: Tensor
    ) -> Tensor:
        fused = super().forward(tokens, maps[self.stage], boxes[self.stage], image_index)
        # A compiled or exported graph has no place for a watcher.
        watcher = None if torch.compiler.is_compiling() else _watcher.get()
        if watcher is not None:
            watcher(self, tokens, fused)
        return fused

    @torch.no_grad()
    def init_fresh(self) -> None:
        """Linear layers scaled by their fan-in, and alpha 0, so that training starts from the untouched ViT."""
        for linear in (self.fc1, self.fc2):
            assert isinstance(linear, nn.Linear)
            init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(linear.bias)
        init.zeros_(self.alpha)


def deep_fusion(config: FilaVisionConfig) -> list[Fusion]:
    """A `DeepFusion` per ConvNeXt stage."""
    return [DeepFusion(config, stage) for stage in range(len(config.convnext_config.hidden_sizes))]


def no_fusion(config: FilaVisionConfig) -> list[Fusion]:
    """No module, hence no ConvNeXt: dynamic cropping alone, as in LLaVA-NeXT."""
    return []


FUSIONS: dict[str, Callable[[FilaVisionConfig], list[Fusion]]] = {"deep": deep_fusion, "none": no_fusion}


def build_fusion(config: FilaVisionConfig) -> nn.ModuleList:
    """The modules that `config` names, one per entry of `config.fusion_layers`, or none at all.

    Raises:
        ValueError: if `config.fusion` is no entry of `FUSIONS`.
    """
    if config.fusion not in FUSIONS:
        raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {config.fusion!r}")
    return nn.ModuleList(FUSIONS[config.fusion](config))

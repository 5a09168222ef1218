"""Defines the fusions: the modules between ViT layers that add to the tiles' tokens what the ConvNeXt saw.

The configuration's `fusion` names an entry of `FUSIONS`, and the encoder builds one module of it per entry of
`fusion_layers`. Each module is called once after its ViT layer and fuses every group of pictures of one canvas size:

    tokens = module.fuse(tokens, maps, boxes, image_index)

    tokens       [T, 1 + N, D], the class token and the patch tokens of every view in the group
    maps         each ConvNeXt stage's map, shallowest first: [B, h/s, w/s, C], channels last
    boxes        for each stage, [T, 4] float32: the region of every view on that stage's map, in cells
    image_index  [T] int32, the picture within the group that each view came from

To add a fusion, derive it from `Fusion`, write its `fuse`, and enter its builder in `FUSIONS`.

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
from fila_kernels import CVFM, explain

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


def show_watcher(fusion: nn.Module, before: Tensor, after: Tensor) -> None:
    """Hands a fusion's input and output to this thread's watcher, if it has one."""
    # A compiled or exported graph has no place for a watcher.
    watcher = None if torch.compiler.is_compiling() else _watcher.get()
    if watcher is not None:
        watcher(fusion, before, after)


class ViewGroup:
    """The pictures of one canvas size.

    It is no dataclass: sharding with mixed precision (FSDP2) would find the boxes in one and round them.

    Args:
        images: positions in the batch of pictures.
        raster: height and width of their rasters, pixels.
        boxes: for each ConvNeXt stage, [T_group, 4] float32 boxes in cells of that stage's map.
        image_index: [T_group] int32, the picture of each view, by its position within the group.
    """

    def __init__(self, images: list[int], raster: tuple[int, int], boxes: list[Tensor], image_index: Tensor):
        self.images = images
        self.raster = raster
        self.boxes = boxes
        self.image_index = image_index


class Fusion(nn.Module):
    """The interface that the rest of the model knows: `fuse`, the first weights, and what a report says of it.

    Nothing outside a fusion reads another attribute of it.
    """

    @property
    def convnext_stage(self) -> int | None:
        """The one ConvNeXt stage that the fusion reads, counted from 1; None where it reads several or none."""
        return None

    def forward(
        self, tokens: Sequence[Tensor], maps: Sequence[Sequence[Tensor]], groups: Sequence[ViewGroup]
    ) -> list[Tensor]:
        """`fuse` for every group.

        One call serves all groups, since sharded weights are gathered at each call and processes differ in their
        groups.
        """
        fused = []
        for x, of_group, group in zip(tokens, maps, groups, strict=True):
            boxes = [box.to(x.device) for box in group.boxes]
            fused.append(self.fuse(x, of_group, boxes, group.image_index.to(x.device)))
        return fused

    def fuse(self, tokens: Tensor, maps: Sequence[Tensor], boxes: Sequence[Tensor], image_index: Tensor) -> Tensor:
        """The tokens of one group with what its maps add; arguments as in the module's docstring."""
        raise NotImplementedError

    def init_fresh(self) -> None:
        """Sets the weights that training starts from, through `transformers.initialization`."""
        raise NotImplementedError

    def use_backend(self, backend: str | None) -> None:
        """Takes the user's choice of a backend of `fila_kernels`; without effect where the fusion uses none."""

    def describe(
        self, tokens: tuple[int, ...], maps: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        """How a call of these shapes is computed, as plain values, in the form of `fila_kernels.explain`.

        Returns:
            "backend" (a dict of "choice" and "why") and "forward" (the plan and why); empty where there is no choice.
        """
        return {}

    def opening(self) -> float | None:
        """The learned gate's alpha; None for a fusion without one."""
        return None


class DeepFusion(CVFM, Fusion):
    """The paper's fusion at one depth: the CVFM, reading the map of one ConvNeXt stage."""

    def __init__(self, config: FilaVisionConfig, stage: int):
        channels = config.convnext_config.hidden_sizes[stage]
        super().__init__(
            config.hidden_size, channels, config.fusion_hidden_size, gate=config.fusion_gate,
            num_prefix_tokens=config.num_prefix_tokens,
        )  # fmt: skip
        self.hidden_width = config.fusion_hidden_size
        self.stage = stage

    forward = Fusion.forward  # type: ignore[assignment]

    def fuse(self, tokens: Tensor, maps: Sequence[Tensor], boxes: Sequence[Tensor], image_index: Tensor) -> Tensor:
        return CVFM.forward(self, tokens, maps[self.stage], boxes[self.stage], image_index)

    @property
    def convnext_stage(self) -> int:
        return self.stage + 1

    def use_backend(self, backend: str | None) -> None:
        self.backend = backend

    def describe(
        self, tokens: tuple[int, ...], maps: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        return explain(
            tokens, maps[self.stage], self.hidden_width, num_prefix_tokens=self.num_prefix_tokens,
            dtype=dtype, device=device, plan=self.plan, backend=self.backend,
        )  # fmt: skip

    def opening(self) -> float | None:
        return float(self.alpha)

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
        ValueError: if `config.fusion` is not an entry of `FUSIONS`.
    """
    if config.fusion not in FUSIONS:
        raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {config.fusion!r}")
    return nn.ModuleList(FUSIONS[config.fusion](config))

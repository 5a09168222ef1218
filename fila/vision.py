"""Encodes pictures with the hybrid encoder: a CLIP ViT over views, a ConvNeXt over the whole picture, fused at depth.

Shapes: T views in the whole batch, N = G*G patch tokens per view, D the ViT's width, C a ConvNeXt stage's width. A
picture's views are its global view and then its tiles, row by row.

Pictures whose canvases have one size form a *group*. Their rasters have one shape, so the ConvNeXt and each fusion run
once per group (at most as many times as there are canvases), and no picture ever sees another's padding.

Source: FILA (arXiv 2412.08378), sections 3.2 and 3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, ConvNextConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPPreTrainedModel, CLIPVisionEmbeddings
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextLayer,
    ConvNextPreTrainedModel,
    ConvNextStage,
)

from fila.configuration import FilaVisionConfig
from fila.fusion import Fusion, build_fusion
from fila.geometry import Layout


class CheckpointedConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
    """A ConvNeXt block that honours `gradient_checkpointing_enable()`, as transformers' own does not."""


class FilaViT(CLIPPreTrainedModel):
    """The CLIP ViT up to the layer that is read, with the names of `transformers.CLIPVisionModel`."""

    config: CLIPVisionConfig
    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig, num_layers: int):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(num_layers))
        self.post_init()


class FilaConvNext(ConvNextPreTrainedModel):
    """The ConvNeXt's stages without the pooling head, with the names of `transformers.ConvNextModel`."""

    def __init__(self, config: ConvNextConfig):
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        for i, stage_rates in enumerate(rates):
            stage = ConvNextStage(config, widths[i], widths[i + 1], stride=2 if i else 1, depth=0)
            stage.layers = nn.ModuleList(
                CheckpointedConvNextLayer(config, dim=widths[i + 1], drop_path=rate) for rate in stage_rates.tolist()
            )
            self.stages.append(stage)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """[B, 3, h, w] to each stage's map, channels last: [B, h/s, w/s, C]."""
        x = self.embeddings(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 2, 3, 1))
        return maps


@dataclass(frozen=True)
class ViewGroup:
    """The pictures of one canvas size.

    Attributes:
        images: positions in the batch of pictures.
        raster: height and width of their rasters, pixels.
        boxes: for each ConvNeXt stage, [T_group, 4] float32 boxes in cells of that stage's map.
        image_index: [T_group] int32, the picture of each view, by its position within the group.
    """

    images: list[int]
    raster: tuple[int, int]
    boxes: list[Tensor]
    image_index: Tensor


def group_views(layouts: list[Layout], strides: list[int], device: torch.device) -> list[ViewGroup]:
    """Groups pictures by canvas, in order of first appearance, and places their views on every stage's map."""
    members: dict[tuple[int, int], list[int]] = {}
    for i, layout in enumerate(layouts):
        members.setdefault(layout.canvas, []).append(i)
    groups = []
    for images in members.values():
        boxes = [[box for i in images for box in layouts[i].boxes(stride)] for stride in strides]
        index = [j for j, i in enumerate(images) for _ in range(layouts[i].num_views)]
        groups.append(
            ViewGroup(
                images,
                layouts[images[0]].raster,
                list(torch.tensor(boxes, dtype=torch.float32).to(device)),
                torch.tensor(index, dtype=torch.int32, device=device),
            )
        )
    return groups


class FilaVisionModel(PreTrainedModel):
    """ViT, ConvNeXt and fusion as one encoder.

    Without fusion (`config.fusion == "none"`) it is the ViT alone, which is LLaVA-NeXT's dynamic cropping, and needs no
    high-resolution raster.
    """

    config: FilaVisionConfig
    config_class = FilaVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer", "CheckpointedConvNextLayer", "DeepFusion"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FilaVisionConfig):
        super().__init__(config)
        self.vit = FilaViT(config.vit_config, config.num_vit_layers)
        fusion = build_fusion(config)
        self.convnext = FilaConvNext(config.convnext_config) if len(fusion) else None
        self.fusion = fusion
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Fusion):
            module.init_fresh()

    def forward(
        self,
        pixel_values: Tensor,
        high_res_pixel_values: Tensor | None = None,
        image_sizes: Tensor | list | None = None,
        layouts: list[Layout] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes a batch of pictures.

        Args:
            pixel_values: [n_images, max_views, 3, tile, tile], the global view first; rows past a picture's own views
                are padding and are not read.
            high_res_pixel_values: [n_images, 3, H, W], each raster in the upper left corner; not read without fusion.
            image_sizes: [n_images, 2], height and width of each picture in its own pixels.
            layouts: what the method `layouts` returned for these tensors, where the caller has asked it before.

        Returns:
            `last_hidden_state` [T, 1 + N, D]: the class token and the patch tokens of every view, picture by picture.

        Raises:
            ValueError: if the tensors do not fit each other or the configuration.
        """
        if layouts is None:
            layouts = self.layouts(pixel_values, high_res_pixel_values, image_sizes)
        groups = group_views(layouts, self.config.convnext_strides, pixel_values.device)
        order = [i for group in groups for i in group.images]
        views = torch.cat([pixel_values[i, : layouts[i].num_views] for i in order])
        rasters = []
        if self.convnext is not None:
            assert high_res_pixel_values is not None
            for group in groups:
                height, width = group.raster
                rasters.append(high_res_pixel_values[group.images, :, :height, :width])
        x = self.encode(views, rasters, groups, **kwargs)
        if order != sorted(order):
            parts = dict(zip(order, x.split([layouts[i].num_views for i in order]), strict=True))
            x = torch.cat([parts[i] for i in range(len(layouts))])
        return BaseModelOutput(last_hidden_state=x)

    def encode(self, views: Tensor, rasters: list[Tensor], groups: list[ViewGroup], **kwargs) -> Tensor:
        """Encodes [T, 3, tile, tile] views, group by group, and each group's rasters [B_group, 3, h, w].

        Returns [T, 1 + N, D]. Without fusion there are no rasters. No value is looked at, so that `torch.export` can
        trace the method (`fila.aot`).
        """
        dtype = self.vit.embeddings.patch_embedding.weight.dtype
        x = self.vit.pre_layrnorm(self.vit.embeddings(views.to(dtype)))
        maps = [self.convnext(raster.to(dtype)) for raster in rasters] if self.convnext is not None else []
        fusion_after = dict(zip(self.config.fusion_layers or [], self.fusion, strict=True)) if len(self.fusion) else {}
        counts = [group.image_index.shape[0] for group in groups]
        for i, layer in enumerate(self.vit.layers):
            x = layer(x, None, **kwargs)
            if i in fusion_after:
                fused = [
                    fusion_after[i](x_group, maps[g], groups[g].boxes, groups[g].image_index)
                    for g, x_group in enumerate(x.split(counts) if len(counts) > 1 else [x])
                ]
                x = fused[0] if len(fused) == 1 else torch.cat(fused)
        return x

    def layouts(self, pixel_values: Tensor, high_res_pixel_values: Tensor | None, image_sizes) -> list[Layout]:
        """Each picture's layout, after checking that the tensors have room for it."""
        if image_sizes is None:
            raise ValueError("expected image_sizes [n_images, 2] beside pixel_values, got none")
        sizes = torch.as_tensor(image_sizes)
        if sizes.ndim != 2 or sizes.shape[1] != 2 or not len(sizes) or sizes.is_floating_point():
            raise ValueError(
                f"expected image_sizes [n_images, 2] in whole pixels of at least one picture, "
                f"got {list(sizes.shape)} in {sizes.dtype}"
            )
        for name, pixels in (("pixel_values", pixel_values), ("high_res_pixel_values", high_res_pixel_values)):
            if pixels is not None and not pixels.is_floating_point():
                raise ValueError(f"expected {name} normalised, in a float dtype, got {pixels.dtype}")
        geometry = self.config.geometry()
        layouts = [geometry.layout(height, width) for height, width in sizes.tolist()]
        tile = geometry.tile
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != (3, tile, tile):
            raise ValueError(
                f"expected pixel_values [n_images, views, 3, {tile}, {tile}], got {list(pixel_values.shape)}"
            )
        if len(layouts) != len(pixel_values):
            raise ValueError(f"expected one row of image_sizes per picture ({len(pixel_values)}), got {len(layouts)}")
        views = max(layout.num_views for layout in layouts)
        if views > pixel_values.shape[1]:
            raise ValueError(f"expected at least {views} views for these image sizes, got {pixel_values.shape[1]}")
        if self.convnext is None:
            return layouts
        if high_res_pixel_values is None:
            raise ValueError(
                "expected high_res_pixel_values beside pixel_values (this model fuses a ConvNeXt), got none"
            )
        raster = [max(layout.raster[axis] for layout in layouts) for axis in (0, 1)]
        shape = tuple(high_res_pixel_values.shape)
        if len(shape) != 4 or shape[:2] != (len(layouts), 3) or shape[2] < raster[0] or shape[3] < raster[1]:
            raise ValueError(
                f"expected high_res_pixel_values [{len(layouts)}, 3, >= {raster[0]}, >= {raster[1]}], got {list(shape)}"
            )
        return layouts


__all__ = ["FilaVisionModel"]

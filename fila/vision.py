"""Encodes pictures with the hybrid encoder: a CLIP ViT over views, a ConvNeXt over the whole picture, fused at depth.

Shapes: T views in the whole batch, N = G*G patch tokens per view, D the ViT's width, C a ConvNeXt stage's width. A
picture's views are its global view and then its tiles, row by row.

Pictures whose canvases have one size form a *group*. Their rasters have one shape, so the ConvNeXt and each fusion
compute group by group (at most as many as there are canvases), and no picture ever sees another's padding. Every module
is called once for all groups: processes that share sharded weights gather them at each call, and their batches may
differ in the number of groups.

Source: FILA (arXiv 2412.08378), sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, ConvNextConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
)
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextLayer,
    ConvNextPreTrainedModel,
    ConvNextStage,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from fila.configuration import FilaVisionConfig
from fila.fusion import Fusion, ViewGroup, build_fusion, show_watcher
from fila.geometry import Layout


def loses_gradient(x: Tensor, layer: nn.Module) -> bool:
    """Whether reentrant checkpointing would leave the layer's weights without a gradient, since `x` needs none."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if x.requires_grad or checkpoint is None or not (layer.training and layer.gradient_checkpointing):
        return False
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
    return reentrant and torch.is_grad_enabled() and any(weight.requires_grad for weight in layer.parameters())


class CheckpointedConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
    """A ConvNeXt block that honours `gradient_checkpointing_enable()`, as transformers' own does not.

    It takes the maps of all groups in one call and returns as many.
    """

    def __call__(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return super().__call__(*(x.detach().requires_grad_() if loses_gradient(x, self) else x for x in maps))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(super(CheckpointedConvNextLayer, self).forward(x) for x in maps)


class GroupedConvNextStage(ConvNextStage):
    """A ConvNeXt stage that takes the maps of all groups in one call and returns as many."""

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        for layer in self.downsampling_layer:
            maps = tuple(layer(x) for x in maps)
        for layer in self.layers:
            maps = layer(*maps)
        return maps


class FilaViT(CLIPPreTrainedModel):
    """The CLIP ViT up to the layer that is read, with the names of `transformers.CLIPVisionModel`."""

    config: CLIPVisionConfig
    config_class = CLIPVisionConfig
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer"]

    def __init__(self, config: CLIPVisionConfig, num_layers: int):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(num_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embedding = value


class FilaConvNext(ConvNextPreTrainedModel):
    """The ConvNeXt's stages without the pooling head, with the names of `transformers.ConvNextModel`."""

    _no_split_modules = ["CheckpointedConvNextLayer"]
    # It has no attention, so that every implementation will do; without these, none but "eager" would load.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConvNextConfig):
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        for i, stage_rates in enumerate(rates):
            stage = GroupedConvNextStage(config, widths[i], widths[i + 1], stride=2 if i else 1, depth=0)
            stage.layers = nn.ModuleList(
                CheckpointedConvNextLayer(config, dim=widths[i + 1], drop_path=rate) for rate in stage_rates.tolist()
            )
            self.stages.append(stage)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embeddings = value

    def forward(self, *rasters: Tensor) -> list[list[Tensor]]:
        """Each group's raster [B, 3, h, w] to each stage's map, channels last: [B, h/s, w/s, C]."""
        # The weights' own dtype: sharded with mixed precision, parts of the tower differ in it (FSDP2).
        dtype = self.embeddings.patch_embeddings.weight.dtype
        x = [self.embeddings(raster.to(dtype, memory_format=torch.channels_last)) for raster in rasters]
        maps: list[list[Tensor]] = [[] for _ in rasters]
        for stage in self.stages:
            x = stage(*x)
            for group, of_group in zip(maps, x, strict=True):
                group.append(of_group.permute(0, 2, 3, 1))
        return maps


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


def sizes_of(image_sizes: Any) -> list[tuple[int, int]]:
    """Height and width of each picture, from a tensor, an array or lists, in pixels.

    Lists never become a tensor, so that `torch.export` keeps their numbers.

    Raises:
        ValueError: if there is no picture, or something else than two whole numbers for one; if sizes whose numbers
            are unknown are exported, since everything else depends on them.
    """
    if image_sizes is None:
        raise ValueError("expected image_sizes [n_images, 2] beside pixel_values, got none")
    sizes = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    try:
        found = [tuple(size.tolist() if hasattr(size, "tolist") else size) for size in sizes]
    except TypeError:
        found = []
    if any(isinstance(side, torch.SymInt) for size in found for side in size):
        raise ValueError("expected image_sizes as a list of numbers for torch.export, got a tensor of unknown ones")
    if not found or not all(len(size) == 2 and all(type(side) is int for side in size) for size in found):
        shape = f"{list(image_sizes.shape)} in {image_sizes.dtype}" if hasattr(image_sizes, "shape") else repr(sizes)
        raise ValueError(f"expected image_sizes [n_images, 2] in whole pixels of at least one picture, got {shape}")
    return found


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
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"attentions": CLIPAttention}

    def __init__(self, config: FilaVisionConfig):
        config.check()
        super().__init__(config)
        self.vit = FilaViT(config.vit_config, config.num_vit_layers)
        fusion = build_fusion(config)
        self.convnext = FilaConvNext(config.convnext_config) if len(fusion) else None
        self.fusion = fusion
        self._no_split_modules = {type(module).__name__ for module in fusion}  # to which `post_init` adds the towers'
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Fusion):
            module.init_fresh()

    def get_input_embeddings(self) -> nn.Module:
        return self.vit.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vit.set_input_embeddings(value)

    def attention_by_part(self) -> dict[str, str]:
        """How attention is computed, as `set_attn_implementation` takes it."""
        parts = {"": self.config, **{name: getattr(self.config, name) for name in self.config.sub_configs}}
        return {name: config._attn_implementation for name, config in parts.items()}

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Sets how attention is computed: one name, or a dictionary with "" or `vit_config` as its key."""
        configs = [getattr(self.config, name) for name in self.config.sub_configs]
        for config in configs:
            # transformers marks what it has set and unmarks no more than two levels: the third would stay as it is.
            vars(config).pop("_attn_was_changed", None)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        high_res_pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | list | None = None,
        layouts: list[Layout] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes a batch of pictures.

        Args:
            pixel_values: [n_images, max_views, 3, tile, tile], the global view first; rows past a picture's own views
                are padding and are not read. Or [views of all pictures, 3, tile, tile], without padding.
            high_res_pixel_values: [n_images, 3, H, W], each raster in the upper left corner; or one [3, h, w] for each
                picture. Not read without fusion.
            image_sizes: [n_images, 2], height and width of each picture in its own pixels. As a list they are
                constants to `torch.export`.
            layouts: what the method `layouts` returned for these tensors, where the caller has asked it before.
            kwargs: `output_hidden_states` and `output_attentions`, by default the configuration's.

        Returns:
            `last_hidden_state` [T, 1 + N, D]: the class token and the patch tokens of every view, picture by picture.
            `hidden_states`: the first layer's input, then every layer's output with the fusion that follows it.
            `attentions`: of every ViT layer; computed by the implementation "eager" only.

        Raises:
            ValueError: if the tensors do not fit each other or the configuration.
        """
        if layouts is None:
            layouts = self.layouts(pixel_values, high_res_pixel_values, image_sizes)
        groups = group_views(layouts, self.config.convnext_strides, pixel_values.device)
        order = [i for group in groups for i in group.images]
        if pixel_values.ndim == 4:
            flat = pixel_values.split([layout.num_views for layout in layouts])
            views = torch.cat([flat[i] for i in order])
        else:
            views = torch.cat([pixel_values[i, : layouts[i].num_views] for i in order])
        rasters = []
        if self.convnext is not None:
            assert high_res_pixel_values is not None
            for group in groups:
                height, width = group.raster
                if isinstance(high_res_pixel_values, Tensor):
                    rasters.append(high_res_pixel_values[group.images, :, :height, :width])
                else:
                    rasters.append(torch.stack([high_res_pixel_values[i][:, :height, :width] for i in group.images]))
        encoded = self._encode(views, rasters, groups, return_dict=True, **kwargs)
        if order == sorted(order):
            return encoded
        counts = [layouts[i].num_views for i in order]

        def in_order(x: Tensor) -> Tensor:
            parts = dict(zip(order, x.split(counts), strict=True))
            return torch.cat([parts[i] for i in range(len(layouts))])

        return BaseModelOutput(
            **{
                name: in_order(value)
                if isinstance(value, Tensor)
                else tuple(x if x is None else in_order(x) for x in value)
                for name, value in encoded.items()
            }
        )

    def encode(self, views: Tensor, rasters: list[Tensor], groups: list[ViewGroup]) -> Tensor:
        """Encodes [T, 3, tile, tile] views, group by group, and each group's rasters [B_group, 3, h, w].

        Returns [T, 1 + N, D]. Without fusion there are no rasters. No value is looked at, so that `torch.export` can
        trace the method (`fila.aot`).
        """
        return self._encode(views, rasters, groups, return_dict=True).last_hidden_state

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(
        self,
        views: Tensor,
        rasters: list[Tensor],
        groups: list[ViewGroup],
        output_hidden_states: bool | Sequence[int] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        dtype = self.vit.embeddings.patch_embedding.weight.dtype
        x = self.vit.pre_layrnorm(self.vit.embeddings(views.to(dtype)))
        maps = self.convnext(*rasters) if self.convnext is not None else []
        fusion_after = dict(zip(self.config.fusion_layers or [], self.fusion, strict=True)) if len(self.fusion) else {}
        counts = [group.image_index.shape[0] for group in groups]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # A list of layers asks for their outputs alone, by position, as in transformers.
        chosen = None if isinstance(output_hidden_states, bool) else output_hidden_states
        states: list[Tensor | None] = [x] if output_hidden_states and chosen is None else []
        for i, layer in enumerate(self.vit.layers):
            x = x.detach().requires_grad_() if loses_gradient(x, layer) else x
            x = layer(x, None, **kwargs)
            if i in fusion_after:
                parts = x.split(counts) if len(counts) > 1 else [x]
                fused = fusion_after[i](parts, maps, groups)
                for before, after in zip(parts, fused, strict=True):
                    show_watcher(fusion_after[i], before, after)
                x = fused[0] if len(fused) == 1 else torch.cat(fused)
            if output_hidden_states:
                states.append(x if chosen is None or i in chosen else None)
        return BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)

    def layouts(
        self, pixel_values: Tensor, high_res_pixel_values: Tensor | Sequence[Tensor] | None, image_sizes
    ) -> list[Layout]:
        """Each picture's layout, after checking that the tensors have room for it."""
        sizes = sizes_of(image_sizes)
        rasters = high_res_pixel_values
        given = [] if rasters is None else [rasters] if isinstance(rasters, Tensor) else list(rasters)
        for name, pixels in [("pixel_values", pixel_values), *(("high_res_pixel_values", pixels) for pixels in given)]:
            if not pixels.is_floating_point():
                raise ValueError(f"expected {name} normalised, in a float dtype, got {pixels.dtype}")
        geometry = self.config.geometry()
        layouts = [geometry.layout(height, width) for height, width in sizes]
        tile = geometry.tile
        if pixel_values.ndim not in (4, 5) or tuple(pixel_values.shape[-3:]) != (3, tile, tile):
            raise ValueError(
                f"expected pixel_values [n_images, views, 3, {tile}, {tile}], got {list(pixel_values.shape)}"
            )
        if pixel_values.ndim == 4:
            views = sum(layout.num_views for layout in layouts)
            if views != len(pixel_values):
                raise ValueError(f"expected {views} views of all pictures, by image_sizes, got {len(pixel_values)}")
        else:
            if len(layouts) != len(pixel_values):
                raise ValueError(
                    f"expected one row of image_sizes per picture ({len(pixel_values)}), got {len(layouts)}"
                )
            views = max(layout.num_views for layout in layouts)
            if views > pixel_values.shape[1]:
                raise ValueError(f"expected at least {views} views for these image sizes, got {pixel_values.shape[1]}")
        if self.convnext is None:
            return layouts
        if rasters is None:
            raise ValueError(
                "expected high_res_pixel_values beside pixel_values (this model fuses a ConvNeXt), got none"
            )
        if not isinstance(rasters, Tensor):
            if len(given) != len(layouts) or any(
                tuple(pixels.shape) != (3, *layout.raster) for pixels, layout in zip(given, layouts, strict=True)
            ):
                wanted = [[3, *layout.raster] for layout in layouts]
                raise ValueError(
                    f"expected high_res_pixel_values of {wanted}, got {[list(pixels.shape) for pixels in given]}"
                )
            return layouts
        raster = [max(layout.raster[axis] for layout in layouts) for axis in (0, 1)]
        shape = tuple(rasters.shape)
        if len(shape) != 4 or shape[:2] != (len(layouts), 3) or shape[2] < raster[0] or shape[3] < raster[1]:
            raise ValueError(
                f"expected high_res_pixel_values [{len(layouts)}, 3, >= {raster[0]}, >= {raster[1]}], got {list(shape)}"
            )
        return layouts


__all__ = ["FilaVisionModel"]

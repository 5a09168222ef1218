"""Configurations of FILA: the hybrid vision encoder's, the whole model's around it, and the presets that fill them.

Every question that the paper leaves open is a field here; `docs/model.md` lists the defaults and their reasons. The
presets are the paper's model and `fila-nano`, the small model that is trained here and shipped.
"""

from collections.abc import Callable
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, ConvNextConfig, LlavaNextConfig, PreTrainedConfig

from fila.geometry import LLAVA_NEXT_CANVASES, Geometry, shared_geometry

CLIP_VIT_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
CLIP_CONVNEXT_L = dict(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3], patch_size=4)


@strict
class FilaVisionConfig(PreTrainedConfig):
    """The hybrid encoder: a ViT over tiles, a ConvNeXt over the whole picture, fused at several depths.

    Args:
        vit_config: `CLIPVisionConfig` of the source ViT, with all its layers; only those that are read are built.
            Defaults to CLIP-ViT-L/14-336.
        convnext_config: `ConvNextConfig`. Defaults to ConvNeXt-L. Four stages in the paper; any number here.
        vision_feature_layer: which of the ViT's hidden states is read, counted as LLaVA counts them: -2 is the input of
            the source's last layer, so a 24-layer ViT is built with 23.
        fusion: an entry of `fila.fusion.FUSIONS`: "deep" (the paper's CVFM), or "none": dynamic cropping alone, no
            ConvNeXt.
        fusion_layers: 0-based ViT layers after which a fusion follows, one per ConvNeXt stage, ascending.
            Defaults to equal quarters of the layers that are built (our choice): 5, 11, 17, 22 of 23.
        fusion_hidden_size: width of the CVFM's hidden layer; the ViT's width if not given (our choice).
        fusion_gate: "product", `X + tanh(alpha * M)` as the paper writes it, or "scale", `X + tanh(alpha) * M`.
        image_grid_pinpoints: allowed canvases, (height, width) in pixels.
        high_res_rule, high_res_size: the rule by which the ConvNeXt's raster is made; see `fila.geometry.Geometry`.
    """

    model_type = "fila_vision"
    base_config_key = "vision_config"
    sub_configs = {"vit_config": CLIPVisionConfig, "convnext_config": ConvNextConfig}

    vit_config: dict | PreTrainedConfig | None = None
    convnext_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    fusion: str = "deep"
    fusion_layers: list[int] | None = None
    fusion_hidden_size: int | None = None
    fusion_gate: Literal["product", "scale"] = "product"
    image_grid_pinpoints: list | None = None
    high_res_rule: Literal["scaled", "fixed", "direct"] = "scaled"
    high_res_size: int = 768

    def __post_init__(self, **kwargs):
        if not isinstance(self.vit_config, PreTrainedConfig):
            self.vit_config = CLIPVisionConfig(**(self.vit_config or CLIP_VIT_L_336))
        if not isinstance(self.convnext_config, PreTrainedConfig):
            self.convnext_config = ConvNextConfig(**(self.convnext_config or CLIP_CONVNEXT_L))
        self.image_grid_pinpoints = [list(c) for c in self.image_grid_pinpoints or LLAVA_NEXT_CANVASES]
        stages, depth = len(self.convnext_config.hidden_sizes), self.num_vit_layers
        if len(self.convnext_config.depths) != stages:
            raise ValueError(
                f"convnext_config: expected {stages} depths, as many as hidden_sizes, got {self.convnext_config.depths}"
            )
        if not 1 <= depth <= self.vit_config.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} names no layer of a ViT of "
                f"{self.vit_config.num_hidden_layers} layers"
            )
        if self.fusion != "none" and depth < stages:
            raise ValueError(
                f"expected at least one ViT layer for each of {stages} ConvNeXt stages, got {depth} layers"
            )
        if self.fusion_hidden_size is not None and self.fusion_hidden_size < 1:
            raise ValueError(f"expected fusion_hidden_size of at least 1, got {self.fusion_hidden_size}")
        if self.fusion_layers is None:
            self.fusion_layers = [(i + 1) * (depth + 1) // stages - 1 for i in range(stages - 1)] + [depth - 1]
        self._check_fusion_layers(stages)
        self.geometry()  # raises where tile, patch, canvases and raster do not fit together
        super().__post_init__(**kwargs)

    def _check_fusion_layers(self, stages: int) -> None:
        layers, depth = self.fusion_layers or [], self.num_vit_layers
        if self.fusion == "none":
            return
        if len(layers) != stages or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < depth:
            raise ValueError(
                f"fusion_layers must name {stages} ascending ViT layers (one per ConvNeXt stage) in 0..{depth - 1}, "
                f"got {layers}"
            )

    @property
    def num_vit_layers(self) -> int:
        """Number of ViT layers that are built; hidden state k is the output of k layers."""
        states = self.vit_config.num_hidden_layers + 1
        return self.vision_feature_layer + (states if self.vision_feature_layer < 0 else 0)

    # LLaVA-NeXT's classes read these three of a vision config.
    @property
    def hidden_size(self) -> int:
        return self.vit_config.hidden_size

    @property
    def image_size(self) -> int:
        return self.vit_config.image_size

    @property
    def patch_size(self) -> int:
        return self.vit_config.patch_size

    @property
    def convnext_strides(self) -> list[int]:
        """Raster pixels per cell of each stage's map."""
        first = self.convnext_config.patch_size
        return [first * 2**i for i in range(len(self.convnext_config.hidden_sizes))]

    def geometry(self) -> Geometry:
        """The layout rules that this model was built for."""
        return shared_geometry(
            self.image_size,
            self.patch_size,
            self.convnext_strides[-1],
            tuple((height, width) for height, width in self.image_grid_pinpoints),
            self.high_res_rule,
            self.high_res_size,
        )


@strict
class FilaConfig(LlavaNextConfig):
    """The whole model: `FilaVisionConfig`, LLaVA-NeXT's projector and a language model.

    Args:
        vision_config: `FilaVisionConfig`.
        text_config: any causal language model's config; Llama by default.

    The canvases and the feature layer belong to `vision_config`; the fields of the same names that
    `LlavaNextConfig` has are copies of them, and giving them another value is an error.
    """

    model_type = "fila"
    sub_configs = {"text_config": LlavaNextConfig.sub_configs["text_config"], "vision_config": FilaVisionConfig}

    vision_feature_layer: int | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = FilaVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.vision_config, FilaVisionConfig):
            raise ValueError(
                f"expected vision_config to be a FilaVisionConfig, got {type(self.vision_config).__name__}"
            )
        for name in ("vision_feature_layer", "image_grid_pinpoints"):
            given, owned = getattr(self, name), getattr(self.vision_config, name)
            if given is not None and not _same(given, owned):
                raise ValueError(f"{name} belongs to vision_config, which has {owned}; got {given} beside it")
            setattr(self, name, owned)
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                'FILA reads patch tokens only: vision_feature_select_strategy must be "default", '
                f"got {self.vision_feature_select_strategy!r}"
            )
        self.image_seq_length = self.vision_config.geometry().grid ** 2
        super().__post_init__(**kwargs)


def _same(a, b) -> bool:
    return [list(c) for c in a] == [list(c) for c in b] if isinstance(a, (list, tuple)) else a == b


NANO_CANVASES = [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]


def fila_llama3_8b() -> FilaConfig:
    """The paper's model: CLIP-ViT-L/14-336, CLIP ConvNeXt-L, LLaMA3-8B.

    The LLM's numbers are Meta-Llama-3-8B-Instruct's own; the image token is its first reserved special token.
    """
    return FilaConfig(
        vision_config=FilaVisionConfig(),
        text_config=dict(
            model_type="llama",
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=128000,
            eos_token_id=128009,
        ),
        image_token_index=128002,
    )


def fila_nano() -> FilaConfig:
    """Seven million parameters that read and write single characters.

    The tile is 64, the patch 8 (64 tokens per view), and the ConvNeXt's stem has stride 2, so the raster is twice the
    canvas. A patch then holds one or two characters of a picture with few lines of text, which a small model learns to
    read. The vocabulary and the special tokens' ids are those of the tokenizer in the shipped checkpoint.
    """
    return FilaConfig(
        vision_config=FilaVisionConfig(
            vit_config=dict(
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=6,
                num_attention_heads=6,
                image_size=64,
                patch_size=8,
                hidden_act="gelu",
            ),
            convnext_config=dict(
                hidden_sizes=[32, 64, 128, 256],
                depths=[2, 2, 4, 2],
                patch_size=2,
                # The library's 0.02 and 1e-6 suit wide and deep towers; at these widths they leave the blocks dead.
                initializer_range=0.06,
                layer_scale_init_value=0.5,
            ),
            vision_feature_layer=-1,
            fusion_layers=[1, 2, 4, 5],
            # The product form bounds what a fusion can add to 1 and saturated within 200 steps; see docs/log.md.
            fusion_gate="scale",
            image_grid_pinpoints=NANO_CANVASES,
            high_res_size=128,
        ),
        text_config=dict(
            model_type="llama",
            vocab_size=102,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.05,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=4,
        tie_word_embeddings=True,  # what is read is what is written
    )


PRESETS: dict[str, Callable[[], FilaConfig]] = {"fila-llama3-8b": fila_llama3_8b, "fila-nano": fila_nano}


def preset(name: str) -> FilaConfig:
    """The configuration of that name.

    >>> preset("fila-nano").vision_config.geometry().grid
    8
    """
    if name not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


__all__ = ["PRESETS", "FilaConfig", "FilaVisionConfig", "preset"]

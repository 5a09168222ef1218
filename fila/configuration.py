"""Configurations of FILA: the hybrid vision encoder's, the whole model's around it, and the presets that fill them.

Every question that the paper leaves open is a field here; `docs/model.md` lists the defaults and their reasons. The
presets are the paper's model and `fila-nano`, the small model that is trained here and shipped.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, ConvNextConfig, PreTrainedConfig

from fila.geometry import LLAVA_NEXT_CANVASES, Geometry, shared_geometry
from fila.settings import OwnedFields, make_part, own_names, part_of, refuse_unknown

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


# In each saved folder: lets `trust_remote_code=True` find FILA where nobody has imported it. It holds no code.
AUTO_FILE = "fila_auto.py"
AUTO_CLASSES = {
    "AutoConfig": "FilaConfig",
    "AutoModel": "FilaModel",
    "AutoModelForImageTextToText": "FilaForConditionalGeneration",
    "AutoModelForMultimodalLM": "FilaForConditionalGeneration",
    "AutoImageProcessor": "FilaImageProcessor",
    "AutoProcessor": "FilaProcessor",
}


@strict
class FilaVisionConfig(OwnedFields):
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

    Some settings have no effect beside others. They are kept and checked all the same, so that a comparison changes one
    setting and nothing else:
        `fusion="none"`: `fusion_layers`, `fusion_hidden_size`, `fusion_gate`, `convnext_config`, `high_res_size`, and
            `high_res_rule` unless it is "direct".
        `high_res_rule="scaled"`: `high_res_size`.
        `high_res_rule="direct"`: `image_grid_pinpoints`.

    `hidden_size`, `image_size` and `patch_size` are the ViT's, and `num_hidden_layers` the number of its layers that
    are built.
    """

    model_type = "fila_vision"
    base_config_key = "vision_config"
    sub_configs = {"vit_config": CLIPVisionConfig, "convnext_config": ConvNextConfig}

    vit_config: Any = None  # given as a dictionary or a configuration, or not at all; afterwards a configuration
    convnext_config: Any = None
    vision_feature_layer: int = -2
    fusion: str = "deep"
    fusion_layers: list[int] | None = None
    fusion_hidden_size: int | None = None
    fusion_gate: Literal["product", "scale"] = "product"
    image_grid_pinpoints: list | None = None
    high_res_rule: Literal["scaled", "fixed", "direct"] = "scaled"
    high_res_size: int = 768

    def __post_init__(self, **kwargs):
        self.vit_config = make_part(CLIPVisionConfig, self.vit_config, CLIP_VIT_L_336, "vit_config")
        self.convnext_config = make_part(ConvNextConfig, self.convnext_config, CLIP_CONVNEXT_L, "convnext_config")
        self.image_grid_pinpoints = [list(c) for c in self.image_grid_pinpoints or LLAVA_NEXT_CANVASES]
        if self.fusion_layers is None:
            stages, depth = len(self.convnext_config.hidden_sizes), self.num_vit_layers
            self.fusion_layers = [(i + 1) * (depth + 1) // stages - 1 for i in range(stages - 1)] + [depth - 1]
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        vit, convnext = self.vit_config, self.convnext_config
        for place, part, names in (
            ("vit_config", vit, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
            ("vit_config", vit, ("image_size", "patch_size")),
            ("convnext_config", convnext, ("hidden_sizes", "depths", "patch_size")),
        ):
            for name in names:
                value = getattr(part, name)
                numbers = value if isinstance(value, (list, tuple)) else [value]
                if not numbers or not all(type(number) is int and number >= 1 for number in numbers):
                    raise ValueError(f"{place}: expected {name} in whole numbers of at least 1, got {value!r}")
            if part.num_channels != 3:
                raise ValueError(f"{place}: expected num_channels 3, red, green and blue, got {part.num_channels}")
        if vit.hidden_size % vit.num_attention_heads:
            raise ValueError(
                f"vit_config: expected a hidden_size that {vit.num_attention_heads} heads share, got {vit.hidden_size}"
            )
        stages, depth = len(convnext.hidden_sizes), self.num_vit_layers
        if len(convnext.depths) != stages:
            raise ValueError(
                f"convnext_config: expected {stages} depths, as many as hidden_sizes, got {convnext.depths}"
            )
        convnext.num_stages = stages  # transformers' default of 4 stays whatever the lists say
        if not 1 <= depth <= vit.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} names no layer of a ViT of "
                f"{vit.num_hidden_layers} layers"
            )
        if self.fusion != "none" and depth < stages:
            raise ValueError(
                f"expected at least one ViT layer for each of {stages} ConvNeXt stages, got {depth} layers"
            )
        if self.fusion_hidden_size is not None and self.fusion_hidden_size < 1:
            raise ValueError(f"expected fusion_hidden_size of at least 1, got {self.fusion_hidden_size}")
        layers = self.fusion_layers or []
        if self.fusion != "none" and not (
            len(layers) == stages and sorted(set(layers)) == list(layers) and 0 <= layers[0] <= layers[-1] < depth
        ):
            raise ValueError(
                f"fusion_layers must name {stages} ascending ViT layers (one per ConvNeXt stage) in 0..{depth - 1}, "
                f"got {layers}"
            )
        self.geometry()  # raises where tile, patch, canvases and raster do not fit together

    @property
    def num_vit_layers(self) -> int:
        """Number of ViT layers that are built; hidden state k is the output of k layers."""
        states = self.vit_config.num_hidden_layers + 1
        return self.vision_feature_layer + (states if self.vision_feature_layer < 0 else 0)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of a view before its patch tokens: CLIP's class token."""
        return 1

    # What LLaVA-NeXT's classes, and engines, read of a vision configuration.
    hidden_size = part_of("vit_config", "hidden_size")
    image_size = part_of("vit_config", "image_size")
    patch_size = part_of("vit_config", "patch_size")

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
class FilaConfig(OwnedFields):
    """The whole model: `FilaVisionConfig`, LLaVA-NeXT's projector and a language model.

    Args:
        vision_config: `FilaVisionConfig`. It owns the canvases and the feature layer.
        text_config: any causal language model's config; Llama by default. It owns `use_cache`,
            `tie_word_embeddings` and `vocab_size`, which may be given here and are passed on.
        image_token_index: the token that stands for a piece of a picture; also known as `image_token_id`.
        projector_hidden_act: the projector's activation.
        multimodal_projector_bias: whether the projector's layers have a bias.
        answer_calibration: slope and offset that turn the mean log-probability of an answer's tokens into the
            probability that it is right, see `fila.confidence`; None where that has not been measured.
        smallest_capital: height of the smallest capitals that the model learned to read, canvas pixels; pictures with
            smaller text are answered with a warning. None says nothing.
    """

    model_type = "fila"
    # What `Trainer` leaves out of predictions, under all versions' names: none is a prediction.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs = {"text_config": AutoConfig, "vision_config": FilaVisionConfig}

    vision_config: Any = None  # given as a dictionary or a configuration, or not at all; afterwards a configuration
    text_config: Any = None
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    answer_calibration: list[float] | None = None
    smallest_capital: float | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = make_part(FilaVisionConfig, self.vision_config, {}, "vision_config")
        self.text_config = _text_config(self.text_config)
        for name in own_names(type(self)) & set(kwargs):
            # transformers drops names that generation has too, such as `use_cache`, so they are set here.
            setattr(self, name, kwargs.pop(name))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if "vision_config" in kwargs:
            # Checkpoints of FILA 0.1 hold copies of what vision_config owns, which no longer count.
            copies = ("vision_feature_layer", "image_grid_pinpoints", "image_seq_length")
            config_dict = {name: value for name, value in config_dict.items() if name not in copies}
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        self.vision_config.check()
        given, smallest = self.answer_calibration, self.smallest_capital
        if given is not None and not (len(given) == 2 and all(map(math.isfinite, given))):
            raise ValueError(f"expected answer_calibration as two finite numbers, slope and offset, got {given!r}")
        if smallest is not None and not 0 < smallest < math.inf:
            raise ValueError(f"expected smallest_capital above 0, got {smallest!r}")

    vision_feature_layer = part_of("vision_config", "vision_feature_layer")
    image_grid_pinpoints = part_of("vision_config", "image_grid_pinpoints")
    use_cache = part_of("text_config", "use_cache", writable=True)
    tie_word_embeddings = part_of("text_config", "tie_word_embeddings", writable=True)
    vocab_size = part_of("text_config", "vocab_size", writable=True)

    @property
    def vision_feature_select_strategy(self) -> str:
        """LLaVA's name for reading the patch tokens and not the class token: FILA reads nothing else."""
        return "default"

    @vision_feature_select_strategy.setter
    def vision_feature_select_strategy(self, value: str) -> None:
        if value != "default":
            raise ValueError(
                f'FILA reads patch tokens only: vision_feature_select_strategy must be "default", got {value!r}'
            )

    @property
    def image_seq_length(self) -> int:
        """Tokens of one view."""
        return self.vision_config.geometry().grid ** 2

    @image_seq_length.setter
    def image_seq_length(self, value: int) -> None:
        if value != self.image_seq_length:
            raise ValueError(f"image_seq_length follows from vision_config: it is {self.image_seq_length}, not {value}")

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        known = ["", *self.sub_configs]
        if unknown := set(value if isinstance(value, dict) else ()) - set(known):
            raise ValueError(f"attn_implementation: expected keys out of {known}, got {sorted(unknown)}")
        PreTrainedConfig._attn_implementation.fset(self, value)

    def to_diff_dict(self):
        """What is saved: beside the settings, where transformers finds the classes."""
        module = AUTO_FILE.removesuffix(".py")
        return super().to_diff_dict() | {"auto_map": {auto: f"{module}.{name}" for auto, name in AUTO_CLASSES.items()}}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Saves `config.json` and the file that `auto_map` names, which imports the package `fila`."""
        os.makedirs(save_directory, exist_ok=True)
        names = sorted(set(AUTO_CLASSES.values()))
        Path(save_directory, AUTO_FILE).write_text(
            '"""Names the classes of the installed package `fila` for transformers; no code of its own."""\n\n'
            f"from fila import {', '.join(names)}\n\n__all__ = {json.dumps(names)}\n"
        )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: transformers would copy this package's source into every saved folder."""


def _text_config(given: Any) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f"text_config: expected a configuration or a dictionary, got {type(given).__name__}")
    given = {"model_type": "llama", **(given or {})}
    if given["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"text_config: expected a model_type that transformers knows, got {given['model_type']!r}")
    kind = CONFIG_MAPPING[given["model_type"]]
    # Language models' configurations carry names of their own makers: what is nearly a known name is a slip.
    refuse_unknown(kind, given, likeness=0.9, place="text_config")
    return kind(**given)


NANO_CANVASES = [[96, 192], [192, 96], [192, 192], [288, 96], [96, 288]]


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

    The tile is 96, the patch 8 (144 tokens per view), and the ConvNeXt's stem has stride 2, so the raster is twice the
    canvas. A patch then holds one to three characters of a picture with few lines of text, which a small model learns
    to read. The vocabulary and the special tokens' ids are those of the tokenizer in the shipped checkpoint.
    """
    return FilaConfig(
        vision_config=FilaVisionConfig(
            vit_config=dict(
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=6,
                num_attention_heads=6,
                image_size=96,
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
            high_res_size=192,
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
            max_position_embeddings=2048,  # three tiles and some twenty questions
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
    12
    """
    if name not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


__all__ = ["PRESETS", "FilaConfig", "FilaVisionConfig", "preset"]

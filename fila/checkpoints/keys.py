"""Names the tensors of the models that a checkpoint is assembled from: one table from a source's names to FILA's each.

A table is all that is known of a layout. In its names `{rest}` stands for anything and every other `{word}` for what
lies between two dots, the same on both sides. A source name with several FILA names is a fused tensor: its rows are
theirs, in equal parts. Tables are read in both directions: to assemble a checkpoint, and to take a tower out again.

To read another layout, write its `KeyMap` and enter it in `VIT`, `CONVNEXT` or `LLAVA_NEXT`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

TOWER, CONVNEXT_TOWER, TEXT = "model.vision_tower.vit.", "model.vision_tower.convnext.", "model.language_model."
HEAD = "lm_head.weight"
# Tensors of FILA that may have no source: `assemble` initialises them as a new model has them.
FUSION, PROJECTOR, NEWLINE = (
    "model.vision_tower.fusion.{rest}",
    "model.multi_modal_projector.{rest}",
    "model.image_newline",
)


@dataclass(frozen=True)
class KeyMap:
    """The names of one layout.

    Attributes:
        layout: what messages and the manifest call it.
        signature: a tensor by which the layout is recognised.
        names: the source's names, and for each FILA's name, or the names of its equal parts of rows.
        left: the source's tensors that FILA does not have.
    """

    layout: str
    signature: str
    names: Mapping[str, str | tuple[str, ...]]
    left: tuple[str, ...] = ()

    def leaves(self, name: str) -> bool:
        """Whether a tensor of the source has no place in FILA, on purpose."""
        return any(_translate(pattern, "", name) is not None for pattern in self.left)

    def targets(self, name: str) -> tuple[str, ...]:
        """FILA's names for a tensor of the source; none where it is left or unknown."""
        for pattern, target in self.names.items() if not self.leaves(name) else ():
            parts = (target,) if isinstance(target, str) else target
            found = [translated for part in parts if (translated := _translate(pattern, part, name)) is not None]
            if found:
                return tuple(found)
        return ()

    def source(self, target: str) -> tuple[str, int, int] | None:
        """The source's name for a tensor of FILA, which of its parts it is, and of how many; None where it has none."""
        for name, pattern in self.names.items():
            parts = (pattern,) if isinstance(pattern, str) else pattern
            for i, part in enumerate(parts):
                found = _translate(part, name, target)
                if found is not None and not self.leaves(found):
                    return found, i, len(parts)
        return None

    def under(self, layout: str, prefix: str) -> "KeyMap":
        """The same names behind a prefix, in another model's files."""
        return KeyMap(
            layout,
            prefix + self.signature,
            {prefix + name: target for name, target in self.names.items()},
            tuple(prefix + name for name in self.left),
        )

    def leaving(self, *names: str) -> "KeyMap":
        return replace(self, left=(*self.left, *names))

    def without_layers(self, first: int, last: int) -> "KeyMap":
        """Leaves the ViT's layers first, ..., last - 1: those above the one that is read."""
        layers = [name for name, target in self.names.items() if TOWER + "layers.{layer}." in str(target)]
        return self.leaving(*(name.replace("{layer}", str(n)) for name in layers for n in range(first, last)))

    def beside(self, layout: str, *others: "KeyMap") -> "KeyMap":
        """The names of several tables, of one model's files."""
        names = {name: target for table in (self, *others) for name, target in table.names.items()}
        return KeyMap(layout, self.signature, names, tuple(name for table in (self, *others) for name in table.left))


@cache
def _pattern(name: str) -> re.Pattern:
    words = re.split(r"\{(\w+)\}", name)
    kinds = [f"(?P<{word}>{'.+' if word == 'rest' else '[^.]+'})" for word in words[1::2]]
    texts = [re.escape(text) for text in words[::2]]
    return re.compile("".join(text + kind for text, kind in zip(texts, [*kinds, ""], strict=True)))


def _translate(pattern: str, into: str, name: str) -> str | None:
    """The name in the words of another pattern; None where it does not match."""
    found = _pattern(pattern).fullmatch(name)
    return into.format(**found.groupdict()) if found else None


CLIP = KeyMap(
    "CLIPVisionModel of transformers",
    "embeddings.class_embedding",
    {
        "embeddings.{rest}": TOWER + "embeddings.{rest}",
        "pre_layrnorm.{rest}": TOWER + "pre_layrnorm.{rest}",
        "encoder.layers.{layer}.{rest}": TOWER + "layers.{layer}.{rest}",
    },
    ("embeddings.position_ids", "post_layernorm.{rest}"),
)
CLIP_TEXT = ("text_model.{rest}", "text_projection.weight", "visual_projection.weight", "logit_scale")
# OpenAI's own layout. The text tower stands beside `visual.` there, under one of two names.
OPEN_CLIP_TEXT = (
    "transformer.{rest}", "token_embedding.weight", "positional_embedding", "ln_final.{rest}", "text_projection",
    "text.{rest}", "logit_scale", "logit_bias",
)  # fmt: skip
RESBLOCK, LAYER = "visual.transformer.resblocks.{layer}.", TOWER + "layers.{layer}."
OPEN_CLIP = KeyMap(
    "open_clip, ViT",
    "visual.class_embedding",
    {
        "visual.class_embedding": TOWER + "embeddings.class_embedding",
        "visual.positional_embedding": TOWER + "embeddings.position_embedding.weight",
        "visual.conv1.weight": TOWER + "embeddings.patch_embedding.weight",
        "visual.ln_pre.{kind}": TOWER + "pre_layrnorm.{kind}",
        RESBLOCK + "ln_1.{kind}": LAYER + "layer_norm1.{kind}",
        RESBLOCK + "attn.in_proj_{kind}": tuple(LAYER + f"self_attn.{part}_proj.{{kind}}" for part in "qkv"),
        RESBLOCK + "attn.out_proj.{kind}": LAYER + "self_attn.out_proj.{kind}",
        RESBLOCK + "ln_2.{kind}": LAYER + "layer_norm2.{kind}",
        RESBLOCK + "mlp.c_fc.{kind}": LAYER + "mlp.fc1.{kind}",
        RESBLOCK + "mlp.c_proj.{kind}": LAYER + "mlp.fc2.{kind}",
    },
    ("visual.ln_post.{kind}", "visual.proj", *OPEN_CLIP_TEXT),
)
VIT = (CLIP.under("CLIPModel of transformers", "vision_model.").leaving(*CLIP_TEXT), CLIP, OPEN_CLIP)

CONVNEXT_TRANSFORMERS = KeyMap(
    "ConvNextModel of transformers",
    "embeddings.patch_embeddings.weight",
    {
        "embeddings.{rest}": CONVNEXT_TOWER + "embeddings.{rest}",
        "encoder.stages.{rest}": CONVNEXT_TOWER + "stages.{rest}",
    },
    ("layernorm.{kind}",),
)
BLOCK, CONVNEXT_LAYER = "stages.{stage}.blocks.{layer}.", CONVNEXT_TOWER + "stages.{stage}.layers.{layer}."
TIMM = KeyMap(
    "timm, ConvNeXt",
    "stem.0.weight",
    {
        "stem.0.{kind}": CONVNEXT_TOWER + "embeddings.patch_embeddings.{kind}",
        "stem.1.{kind}": CONVNEXT_TOWER + "embeddings.layernorm.{kind}",
        "stages.{stage}.downsample.{rest}": CONVNEXT_TOWER + "stages.{stage}.downsampling_layer.{rest}",
        BLOCK + "conv_dw.{kind}": CONVNEXT_LAYER + "dwconv.{kind}",
        BLOCK + "norm.{kind}": CONVNEXT_LAYER + "layernorm.{kind}",
        BLOCK + "mlp.fc1.{kind}": CONVNEXT_LAYER + "pwconv1.{kind}",
        BLOCK + "mlp.fc2.{kind}": CONVNEXT_LAYER + "pwconv2.{kind}",
        BLOCK + "gamma": CONVNEXT_LAYER + "layer_scale_parameter",
    },
    ("head.{rest}",),
)
CONVNEXT = (
    TIMM.under("open_clip, ConvNeXt of timm", "visual.trunk.").leaving("visual.head.{rest}", *OPEN_CLIP_TEXT),
    TIMM,
    CONVNEXT_TRANSFORMERS.under("ConvNextForImageClassification of transformers", "convnext.").leaving(
        "classifier.{kind}"
    ),
    CONVNEXT_TRANSFORMERS,
)


def causal_lm(prefix: str) -> KeyMap:
    """The names of a causal language model of transformers, whose body stands under `prefix`."""
    return KeyMap(
        f"causal language model of transformers, {prefix}",
        "",
        {f"{prefix}.{{rest}}": TEXT + "{rest}", HEAD: HEAD},
        # Computed from the configuration; older files hold them.
        (f"{prefix}.layers.{{layer}}.self_attn.rotary_emb.inv_freq",),
    )


LLAVA_NEXT_LLM = causal_lm("model").under("", "language_model.")
LLAVA_NEXT_PROJECTOR = KeyMap("", "", {"multi_modal_projector.{rest}": PROJECTOR, "image_newline": NEWLINE})
LLAVA_NEXT = tuple(
    CLIP.under("", prefix).beside(f"LLaVA-NeXT, {prefix}", LLAVA_NEXT_LLM, LLAVA_NEXT_PROJECTOR)
    for prefix in ("vision_tower.vision_model.", "vision_tower.")  # of the hub's files; of transformers 5
)

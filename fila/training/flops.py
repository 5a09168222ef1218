"""Counts the floating-point operations of a step, for the model FLOPs utilisation: products alone, no recomputation."""

from collections.abc import Collection, Sequence

from fila.configuration import FilaConfig
from fila.geometry import Layout

# Dense bfloat16, teraFLOP/s, by a part of the device's name; makers' figures.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}


def forward_flops(config: FilaConfig, lengths: Sequence[int], layouts: Sequence[Layout]) -> dict[str, float]:
    """Operations of one forward pass, by part.

    Args:
        lengths: tokens of each record, image tokens included; records attend within themselves.
        layouts: of each picture.
    """
    text, vision = config.text_config, config.vision_config
    vit, convnext = vision.vit_config, vision.convnext_config
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    attention = width * head * (2 * heads + 2 * text.num_key_value_heads)
    layer = attention + 3 * width * text.intermediate_size
    tokens = sum(lengths)
    # Causal: half of the pairs, in two products.
    pairs = sum(length * length for length in lengths) * heads * head * 2
    found = {
        "language_model": text.num_hidden_layers * (2 * tokens * layer + pairs) + 2 * tokens * width * text.vocab_size
    }
    views, grid = sum(layout.num_views for layout in layouts), vision.geometry().grid
    patches, depth = grid * grid, vision.num_vit_layers
    rows = views * (patches + vision.num_prefix_tokens)
    block = 4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size
    found["vit"] = depth * (2 * rows * block + 4 * rows * (patches + vision.num_prefix_tokens) * vit.hidden_size)
    found["vit"] += 2 * views * patches * vit.hidden_size * 3 * vit.patch_size**2
    found["projector"] = 2 * views * patches * (vit.hidden_size * width + width * width)
    found["convnext"] = found["fusion"] = 0.0
    if vision.fusion == "none":
        return found
    pixels = sum(layout.raster[0] * layout.raster[1] for layout in layouts)
    before = 3 * convnext.patch_size**2
    for stride, channels, blocks in zip(vision.convnext_strides, convnext.hidden_sizes, convnext.depths, strict=True):
        cells = pixels / stride**2
        found["convnext"] += 2 * cells * channels * (before + blocks * (49 + 8 * channels))
        before = 4 * channels
        hidden = vision.fusion_hidden_size or vit.hidden_size
        found["fusion"] += 2 * rows * hidden * (2 * vit.hidden_size + channels)
    return found


def step_flops(forward: dict[str, float], trains: Collection[str]) -> float:
    """Operations of forward and backward: a part that learns takes two more passes, one that gradients cross one more.

    Gradients cross the language model always, the ViT where it, a fusion or the ConvNeXt learns.
    """
    learning = set(forward) if "all" in trains else set(trains)
    crossed = {"language_model", "projector"}
    if learning & {"fusion", "vit", "convnext"}:
        crossed |= {"vit", "fusion"}
    return sum(flops * (3 if part in learning else 2 if part in crossed else 1) for part, flops in forward.items())

"""Reads a checkpoint's configuration: data that says how large the model is, and nothing that leads elsewhere.

A configuration comes from outside. Its counts are compared with the stored tensors before anything is built from them,
and a setting that would load a kernel, other weights or another file is refused.
"""

import math
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from fila.checkpoints.check import GENERATION, Checkpoint, shown
from fila.checkpoints.quiet import quiet
from fila.configuration import FilaConfig
from fila.errors import is_out_of_memory, one_line

# Where the checkpoint was and which Python file holds its classes: neither is asked here.
IGNORED = ("_name_or_path", "name_or_path", "_commit_hash", "auto_map", "transformers_version")
# Settings by which transformers loads other files, kernels or patches.
LEADING_ELSEWHERE = (
    "base_model_name_or_path", "configuration_files", "custom_generate", "custom_pipelines", "distributed_config",
    "fusion_config", "kernel_config", "transformers_weights", "use_kernels",
)  # fmt: skip
BUILT_IN_ATTENTION = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Whole numbers of at least 1, by the names that language models give them.
TEXT_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions",
)  # fmt: skip
MOST_COUNTED = 10**6  # experts, labels or heads
MOST_CANVASES = 1000
MOST_CANVAS_SIDE = 2**15
MOST_CANVAS_PIXELS = 10**8  # of a canvas, or of its raster


def read_config(checkpoint: Checkpoint, num_tensors: int) -> FilaConfig:
    """The configuration of a checkpoint that stores so many tensors.

    Raises:
        CheckpointError: another model's, quantized, of impossible sizes, or with settings that lead out of the folder.
    """
    found = checkpoint.read_object("config.json")
    if found.get("model_type") != "fila":
        raise checkpoint.error(f'expected model_type "fila", got {shown(repr(found.get("model_type")))}')
    if found.get("quantization_config") is not None:
        # transformers ignores methods it does not know, and needs further packages for those it does.
        got = found["quantization_config"]
        method = got.get("quant_method") if isinstance(got, dict) else got
        raise checkpoint.error(f"expected weights that are not quantized, got quant_method {shown(repr(method))}")
    faults = [*_part_faults(found), *_setting_faults(found, "config.json", num_tensors)]
    if faults:
        raise checkpoint.error(*faults)
    try:
        with quiet():
            config = FilaConfig.from_dict(_without(found, IGNORED))
    except Exception as error:  # strict dataclasses and nested configurations raise nearly anything
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(f"config.json does not describe a model: {shown(one_line(error))}") from error
    if faults := [*_text_faults(config.text_config), *_canvas_faults(config)]:
        raise checkpoint.error(*faults)
    return config


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """How the checkpoint would generate, for those who call `generate` themselves; None where it does not say.

    Raises:
        CheckpointError: the file cannot be read; transformers would ignore it, and with it the tokens that end answers.
    """
    if not checkpoint.has(GENERATION):
        return None
    found = checkpoint.read_object(GENERATION)
    faults = [
        f"{GENERATION}: expected {name} as a token's number or a list of them, got {shown(repr(found[name]))}"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if not _are_tokens(found.get(name))
    ]
    faults += [
        f"{GENERATION}: expected {name} left out, got {shown(repr(value))}"
        for name, value in found.items()
        if name in LEADING_ELSEWHERE and value is not None
    ]
    if faults:
        raise checkpoint.error(*faults)
    try:
        with quiet():
            return GenerationConfig.from_dict(found)
    except Exception as error:  # the types of the values are not checked there
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(f"{GENERATION} cannot be read: {shown(one_line(error))}") from error


def _part_faults(found: dict[str, Any]) -> Iterator[str]:
    """Parts that are missing: their defaults are models of billions of parameters."""
    for part in ("text_config", "vision_config"):
        if not isinstance(found.get(part), dict):
            yield f"config.json: expected an object {part}, got {shown(repr(found.get(part)))}"


def _setting_faults(found: dict[str, Any], place: str, num_tensors: int) -> Iterator[str]:
    """Settings, at any depth, that lead elsewhere or count more than the checkpoint can hold."""
    for name, value in found.items():
        where = f"{place}: expected {shown(name)}"
        if isinstance(value, dict):
            yield from _setting_faults(value, f"{place}, {shown(name)}", num_tensors)
        if value is None or name in IGNORED:
            continue
        if name in LEADING_ELSEWHERE or name.endswith(("_file", "_files")):
            yield f"{where} left out, since a checkpoint is read from its own files only, got {shown(repr(value))}"
        elif name == "quantization_config":
            yield f"{where} left out, since weights are not quantized, got {shown(repr(value))}"
        elif name.endswith(("attn_implementation", "attn_implementation_internal", "experts_implementation")):
            named = list(value.values()) if isinstance(value, dict) else [value]
            if any(one is not None and one not in BUILT_IN_ATTENTION for one in named):
                known = ", ".join(BUILT_IN_ATTENTION)
                yield f"{where} out of {known}, since a checkpoint names no kernels, got {shown(repr(value))}"
        elif name in ("dtype", "torch_dtype"):
            if value not in DTYPES and value != "auto":
                yield f"{where} out of {', '.join(DTYPES)}, got {shown(repr(value))}"
        elif name.startswith(("num_", "n_")) or name.endswith("_layers") or name == "depths":
            counts = value if isinstance(value, list) else [value]
            numbers = [number for number in counts if isinstance(number, (int, float))]
            is_depth = name == "depths" or name.endswith(("_layers", "_layer", "_blocks", "_stages"))
            most = num_tensors if is_depth and name != "fusion_layers" else MOST_COUNTED
            if sum(numbers) > most or len(counts) > most:
                holds = f"{num_tensors} tensors" if most == num_tensors else "no more than a million of anything"
                yield f"{where} to fit a checkpoint of {holds}, got {shown(repr(value))}"
    if place == "config.json, text_config":
        for name in TEXT_SIZES:
            value = found.get(name)
            if value is not None and (type(value) is not int or value < 1):
                yield f"{place}: expected {name} as a whole number of at least 1, got {shown(repr(value))}"


def _text_faults(text: Any) -> Iterator[str]:
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    width = getattr(text, "hidden_size", None)
    if type(heads) is int and type(width) is int and not getattr(text, "head_dim", None) and width % heads:
        yield f"text_config: expected a hidden_size that {heads} heads share, got {width}"
    if type(heads) is int and type(shared) is int and heads % shared:
        yield f"text_config: expected num_key_value_heads that divide {heads} heads, got {shared}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not _are_tokens(getattr(text, name, None)):
            yield f"text_config: expected {name} as a token's number, got {shown(repr(getattr(text, name)))}"


def _are_tokens(value: Any) -> bool:
    return value is None or all(type(one) is int for one in (value if isinstance(value, list) else [value]))


def _canvas_faults(config: FilaConfig) -> Iterator[str]:
    """Canvases on which one picture would take all memory."""
    geometry = config.vision_config.geometry()
    if len(geometry.canvases) > MOST_CANVASES:
        yield f"image_grid_pinpoints: expected at most {MOST_CANVASES} canvases, got {len(geometry.canvases)}"
        return
    for height, width in ((geometry.tile, geometry.tile), *geometry.canvases):
        scaled = (height * geometry.stride // geometry.patch, width * geometry.stride // geometry.patch)
        raster = scaled if geometry.rule == "scaled" else (geometry.fixed_size, geometry.fixed_size)
        for what, sides in (("canvas", (height, width)), ("raster", raster)):
            if max(sides) > MOST_CANVAS_SIDE or math.prod(sides) > MOST_CANVAS_PIXELS:
                yield (
                    f"vision_config: expected a {what} of at most {MOST_CANVAS_SIDE} pixels per side and "
                    f"{MOST_CANVAS_PIXELS} in all, got {sides[0]}x{sides[1]}"
                )


def _without(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in found.items()
        if name not in names
    }

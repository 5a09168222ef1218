"""Finds the models that a checkpoint is assembled from, and reads their headers and settings as data.

A source is a local folder as its library writes it. Weights are read from safetensors files or, where there are none,
from .bin files by `torch.load(weights_only=True)`; no code of a folder runs and nothing in it is written to.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, CLIPVisionConfig, ConvNextConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fila.checkpoints.check import (
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    CheckpointError,
    read_index,
    resolve,
    shown,
)  # fmt: skip
from fila.checkpoints.keys import CONVNEXT_TOWER, KeyMap, causal_lm
from fila.checkpoints.quiet import quiet
from fila.checkpoints.weights import STORED_DTYPES, open_tensors
from fila.errors import is_out_of_memory, one_line

OPEN_CLIP_SETTINGS = "open_clip_config.json"
# In the order in which they are looked for.
WEIGHT_FILES = (
    WEIGHTS_INDEX, WEIGHTS, "open_clip_model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
# What a folder's model depends on beside its weights.
SETTINGS_FILES = (
    "config.json", OPEN_CLIP_SETTINGS, "preprocessor_config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# Widths and depths by timm's names, which its files do not repeat.
TIMM_CONVNEXT = {
    "tiny": ([96, 192, 384, 768], [3, 3, 9, 3]),
    "small": ([96, 192, 384, 768], [3, 3, 27, 3]),
    "base": ([128, 256, 512, 1024], [3, 3, 27, 3]),
    "large": ([192, 384, 768, 1536], [3, 3, 27, 3]),
    "xlarge": ([256, 512, 1024, 2048], [3, 3, 27, 3]),
    "xxlarge": ([384, 768, 1536, 3072], [3, 4, 30, 3]),
}
OPEN_CLIP_VIT = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}
MOST_SHOWN = 3


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: the file's name, the shape, and the dtype by safetensors' names."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """A model that a checkpoint is assembled from: its folder's files, the table of its names, its tensors' headers."""

    role: str
    files: Checkpoint
    key_map: KeyMap
    headers: dict[str, Header]

    def hashes(self, progress: Callable[[int], Any]) -> dict[str, str]:
        """SHA-256 of the files that the source is read from."""
        names = [path.name for path in self.files.weights] + [file for file in SETTINGS_FILES if self.files.has(file)]
        found = {}
        for name in names:
            with (self.files.folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
                progress(file.tell())
        return found


class _Mapped:
    """A tensor with the methods of a safetensors slice."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return next(
            (name for name, dtype in STORED_DTYPES.items() if dtype == self.tensor.dtype), str(self.tensor.dtype)
        )

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


@contextmanager
def open_file(checkpoint: Checkpoint, path: Path) -> Iterator[Mapping[str, Any]]:
    """The tensors of one file by name, read when asked for.

    Raises:
        CheckpointError: the file is damaged, or a pickle of something else than named tensors.
    """
    if path.suffix == ".bin":
        yield _open_pickle(checkpoint, path)
        return
    with open_tensors(replace(checkpoint, weights=[path], index=None), dtypes=None) as tensors:
        yield tensors


def _open_pickle(checkpoint: Checkpoint, path: Path) -> dict[str, _Mapped]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the archive, of the pickle, of what it asks for
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(
            f"{path.name}: expected tensors that torch.load(weights_only=True, mmap=True) reads, "
            f"got: {shown(one_line(error))}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    ):
        raise checkpoint.error(f"{path.name}: expected a state dict, named tensors alone, got {type(found).__name__}")
    return {name: _Mapped(tensor) for name, tensor in found.items()}


def find_folder(role: str, path: str | Path) -> Checkpoint:
    """A source's folder before anything in it is read.

    Raises:
        CheckpointError: no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{role} {shown(path)}: expected a folder, got {'a file' if folder.exists() else 'none'}")
    return Checkpoint(f"{role} {folder}", folder)


def find_source(role: str, path: str | Path, layouts: Sequence[KeyMap]) -> Source:
    """The source of that role in a folder: the first of its weights in one of the layouts.

    Raises:
        CheckpointError: no such folder, no weights, or weights of other models.
    """
    found, folder = find_folder(role, path), Path(path)
    seen: list[str] = []
    for file in WEIGHT_FILES:
        if not (folder / file).exists():
            continue
        files = _files(found, file)
        headers = _read_headers(files)
        for layout in layouts:
            if layout.signature in headers or not layout.signature:
                return Source(role, files, layout, headers)
        seen += list(headers)[:MOST_SHOWN]
    if not seen:
        raise CheckpointError(f"{role} {folder}: expected weights, one of {', '.join(WEIGHT_FILES)}, got none")
    known = "; ".join(f"{layout.layout} (with {layout.signature})" for layout in layouts)
    raise CheckpointError(f"{role} {folder}: expected tensors of {known}; got {shown(', '.join(seen))}, ...")


def _files(checkpoint: Checkpoint, file: str) -> Checkpoint:
    """The files of one layout of weights, each in the folder."""
    index = None
    if file.endswith(".index.json"):
        index = read_index(checkpoint, file, ".bin" if file.startswith("pytorch") else ".safetensors")
    names = [file] if index is None else sorted(set(index.values()))
    for name in names:
        resolve(checkpoint, name)
    return replace(checkpoint, weights=[checkpoint.folder / name for name in names], index=index)


def _read_headers(files: Checkpoint) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    faults = []
    for path in files.weights:
        with open_file(files, path) as tensors:
            for name, tensor in tensors.items():
                if name in headers:
                    faults.append(
                        f"tensor {shown(name)}: expected it once, got it in {headers[name].file} and {path.name}"
                    )
                headers[name] = Header(path.name, tuple(tensor.get_shape()), tensor.get_dtype())
    for name, file in (files.index or {}).items():
        if name not in headers or headers[name].file != file:
            got = headers[name].file if name in headers else "no file"
            faults.append(f"tensor {shown(name)}: expected it in {file}, got it in {got}")
    if faults:
        raise files.error(*faults)
    return headers


def _configuration(files: Checkpoint, kind: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration of transformers from settings that come from outside."""
    try:
        with quiet():
            return kind.from_dict(dict(settings))
    except Exception as error:  # strict dataclasses and nested configurations raise nearly anything
        if is_out_of_memory(error):
            raise
        raise files.error(f"its settings do not describe a model: {shown(one_line(error))}") from error


def _model_type(files: Checkpoint, settings: Mapping[str, Any], *known: str) -> None:
    if settings.get("model_type") not in known:
        raise files.error(f"expected model_type {' or '.join(known)}, got {shown(repr(settings.get('model_type')))}")
    if settings.get("quantization_config") is not None:
        raise files.error("expected weights that are not quantized, got a quantization_config")


def vit_config(source: Source) -> CLIPVisionConfig:
    """The configuration of a CLIP vision tower, with all its layers."""
    if source.key_map.layout.startswith("open_clip"):
        return _open_clip_vit(source.files)
    settings = source.files.read_object("config.json")
    _model_type(source.files, settings, "clip", "clip_vision_model")
    return clip_vision(source.files, settings.get("vision_config", settings))


def clip_vision(files: Checkpoint, settings: Mapping[str, Any]) -> CLIPVisionConfig:
    """A CLIP vision tower's configuration, without what describes its file."""
    _model_type(files, {"model_type": "clip_vision_model", **settings}, "clip_vision_model")
    found = _configuration(files, CLIPVisionConfig, settings)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
             "image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")  # fmt: skip
    return CLIPVisionConfig(**{name: getattr(found, name) for name in names})


def _open_clip_vit(files: Checkpoint) -> CLIPVisionConfig:
    model = files.read_object(OPEN_CLIP_SETTINGS).get("model_cfg")
    model = model if isinstance(model, dict) else {}
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict) or not {"image_size", "layers", "width", "patch_size"} <= set(vision):
        raise files.error(
            f"{OPEN_CLIP_SETTINGS}: expected model_cfg.vision_cfg with image_size, layers, width, patch_size"
        )
    if strangers := sorted(set(vision) - OPEN_CLIP_VIT):
        raise files.error(
            f"{OPEN_CLIP_SETTINGS}: expected a plain ViT, got vision_cfg with {shown(', '.join(strangers))}"
        )
    numbers = [vision[name] for name in ("image_size", "layers", "width", "patch_size")]
    head, ratio = vision.get("head_width", 64), vision.get("mlp_ratio", 4.0)
    if any(type(n) is not int or n < 1 for n in (*numbers, head)) or not isinstance(ratio, (int, float)):
        raise files.error(
            f"{OPEN_CLIP_SETTINGS}: expected whole numbers of at least 1 in vision_cfg, got {shown(vision)}"
        )
    size, layers, width, patch = numbers
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=int(width * ratio), num_hidden_layers=layers,
        num_attention_heads=width // head, image_size=size, patch_size=patch,
        hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",
    )  # fmt: skip


def convnext_config(source: Source) -> ConvNextConfig:
    """The configuration of a ConvNeXt: widths, depths and stem as most of its tensors have them, and as it names them.

    Raises:
        CheckpointError: another model, another activation, or tensors of other widths or depths than it names.
    """
    files, named = source.files, dict[str, Any]()
    if source.key_map.layout.endswith("transformers"):
        settings = files.read_object("config.json")
        _model_type(files, settings, "convnext")
        if settings.get("hidden_act", "gelu") != "gelu":
            raise files.error(f"expected hidden_act gelu, got {shown(repr(settings['hidden_act']))}")
        named = {name: settings[name] for name in ("hidden_sizes", "depths", "patch_size") if name in settings}
    else:
        name, named = _timm_model(files)
        if not re.match(r"convnext(_|$)", name):
            raise files.error(f"expected a ConvNeXt of timm, got {shown(repr(name))}")
        size = re.match(r"convnext_([a-z]+)", name)
        if not named and size and size[1] in TIMM_CONVNEXT:
            named = dict(zip(("hidden_sizes", "depths"), TIMM_CONVNEXT[size[1]], strict=True))
    widths: dict[int, Counter] = {}
    depths: Counter = Counter()
    patches: Counter = Counter()
    for name, header in source.headers.items():
        for target in source.key_map.targets(name):
            layer = re.match(re.escape(CONVNEXT_TOWER) + r"stages\.(\d{1,3})\.layers\.(\d{1,4})\.(?!pwconv1)", target)
            if layer and header.shape:
                stage = int(layer[1])
                widths.setdefault(stage, Counter())[header.shape[0]] += 1
                depths[stage] = max(depths[stage], int(layer[2]) + 1)
            elif target.endswith("embeddings.patch_embeddings.weight") and header.shape:
                patches[header.shape[-1]] += 1
    if not patches or sorted(widths) != list(range(len(widths))) or not widths:
        raise files.error("expected a ConvNeXt's stem and stages, got some of them alone")
    found = {
        "hidden_sizes": [widths[stage].most_common(1)[0][0] for stage in sorted(widths)],
        "depths": [depths[stage] for stage in sorted(widths)],
        "patch_size": patches.most_common(1)[0][0],
    }
    faults = [f"expected {name} {value!r:.200}, got tensors of {found[name]}" for name, value in named.items()
              if value != found[name]]  # fmt: skip
    if faults:
        raise files.error(*faults)
    return ConvNextConfig(**found)


def _timm_model(files: Checkpoint) -> tuple[str, dict[str, Any]]:
    """timm's name of a ConvNeXt, and the settings that its file gives beside."""
    if files.has(OPEN_CLIP_SETTINGS):
        model = files.read_object(OPEN_CLIP_SETTINGS).get("model_cfg")
        vision = model.get("vision_cfg") if isinstance(model, dict) else None
        return str(vision.get("timm_model_name") if isinstance(vision, dict) else None), {}
    settings = files.read_object("config.json")
    arguments = settings.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise files.error(f"config.json: expected an object model_args, got {shown(repr(arguments))}")
    names = {"dims": "hidden_sizes", "depths": "depths", "patch_size": "patch_size"}
    return str(settings.get("architecture")), {names[name]: arguments[name] for name in names if name in arguments}


def text_config(files: Checkpoint) -> PreTrainedConfig:
    """The configuration of a causal language model that transformers has."""
    settings = files.read_object("config.json")
    kind = settings.get("model_type")
    if (
        not isinstance(kind, str)
        or kind not in CONFIG_MAPPING
        or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise files.error(f"expected a causal language model of transformers, got model_type {shown(repr(kind))}")
    _model_type(files, settings, kind)
    return _configuration(files, CONFIG_MAPPING[kind], settings)


def text_names(config: PreTrainedConfig) -> KeyMap:
    """The table of the names that transformers gives a causal language model's tensors."""
    return causal_lm(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix)


def llava_next_config(files: Checkpoint) -> Any:
    settings = files.read_object("config.json")
    _model_type(files, settings, "llava_next")
    found = _configuration(files, CONFIG_MAPPING["llava_next"], settings)
    if found.vision_feature_select_strategy != "default":
        raise files.error(
            f'expected vision_feature_select_strategy "default", got {found.vision_feature_select_strategy!r}'
        )
    return found


def normalisation(files: Checkpoint) -> dict[str, list[float]]:
    """Mean and standard deviation that the source's pictures were normalised with; nothing where it does not say."""
    found: Any = {}
    if files.has("preprocessor_config.json"):
        found = files.read_object("preprocessor_config.json")
        found = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    elif files.has(OPEN_CLIP_SETTINGS):
        found = files.read_object(OPEN_CLIP_SETTINGS).get("preprocess_cfg")
    elif files.has("config.json"):
        found = files.read_object("config.json").get("pretrained_cfg")
    found = found if isinstance(found, dict) else {}
    return {f"image_{name}": found[name] for name in ("mean", "std") if found.get(name) is not None}

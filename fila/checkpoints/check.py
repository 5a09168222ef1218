"""Checks a checkpoint: its files, its configuration, its processor, and the tensors that were loaded.

`transformers` only warns where a checkpoint lacks a tensor or has one of another shape, and continues with random
numbers in its place. Here each such case is a `CheckpointError` that names the tensor, what was expected and what came.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from fila.checkpoints.quiet import quiet
from fila.configuration import FilaConfig
from fila.errors import one_line
from fila.processing import FilaProcessor

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained" / "fila-nano"
HUB_PREFIX = "hf:"
REQUIRED_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
STORED_DTYPES = ("F32", "F16", "BF16", "F64")  # safetensors' names; other dtypes would be cast in silence
MOST_NAMED = 3  # tensors named in one message


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, what was expected and what came."""


def locate(path: str | Path | None) -> tuple[str, str, dict[str, Any]]:
    """Finds a checkpoint and checks the files of a local one.

    Args:
        path: a folder, `hf:owner/name`, or None for the shipped checkpoint.

    Returns:
        The checkpoint's name in messages, what `from_pretrained` takes, and its options; with those a local folder
        never reaches a network.
    """
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        return path, path.removeprefix(HUB_PREFIX), {}
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        if path is None:
            raise CheckpointError(
                f"expected the shipped checkpoint at {folder}, got nothing there; name another folder"
            )
        got = "a file" if folder.exists() else "nothing there"
        hint = (
            f"; {HUB_PREFIX}{path} would fetch it from the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        )
        raise CheckpointError(f"checkpoint {path}: expected a folder, got {got}{hint}")
    check_files(folder)
    return str(folder), str(folder), {"local_files_only": True}


def check_files(folder: Path) -> None:
    """Refuses a folder whose files are missing or cannot be read."""
    for file in REQUIRED_FILES:
        if not (folder / file).is_file():
            raise CheckpointError(f"checkpoint {folder}: expected a file {file}, got none")
    if (folder / GENERATION).is_file():
        # transformers ignores a file that it cannot read, and with it the tokens that end an answer.
        try:
            with quiet():
                GenerationConfig.from_dict({**json.loads((folder / GENERATION).read_text())})
        except Exception as error:  # the types of the values are not checked there
            raise CheckpointError(f"checkpoint {folder}: {GENERATION} cannot be read: {one_line(error)}") from error
    for weights in _weight_files(folder):
        try:
            with safe_open(weights, framework="pt") as tensors:
                stored = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {folder}: expected a complete safetensors file {weights.name}, got: {one_line(error)}"
            ) from error
        _refuse(
            str(folder),
            [
                f"tensor {key}: expected dtype {', '.join(STORED_DTYPES)}, got {dtype}"
                for key, dtype in sorted(stored.items())
                if dtype not in STORED_DTYPES
            ],
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"checkpoint {folder}: expected a file {WEIGHTS} or {WEIGHTS_INDEX}, got neither")
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {WEIGHTS_INDEX} cannot be read: {one_line(error)}") from error
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(f"checkpoint {folder}: {WEIGHTS_INDEX}: expected names of files, got {name!r}")
    return [folder / name for name in names]


def read_config(name: str, source: str, options: dict[str, Any]) -> FilaConfig:
    """The configuration of a checkpoint that `locate` found."""
    local = Path(source) / "config.json"
    try:
        # Not every version of transformers checks that the file holds an object.
        found = json.loads(local.read_text()) if local.is_file() else {}
        if isinstance(found, dict):
            found, _ = PreTrainedConfig.get_config_dict(source, **options)
    except Exception as error:
        raise CheckpointError(f"checkpoint {name}: config.json cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {name}: config.json: expected an object, got {type(found).__name__}")
    if found.get("model_type") != "fila":
        raise CheckpointError(f'checkpoint {name}: expected model_type "fila", got {found.get("model_type")!r}')
    if found.get("quantization_config") is not None:
        # transformers ignores methods it does not know, and needs further packages for those it does.
        got = found["quantization_config"]
        method = got.get("quant_method") if isinstance(got, dict) else got
        raise CheckpointError(
            f"checkpoint {name}: expected weights that are not quantized, got quant_method {method!r}"
        )
    try:
        return FilaConfig.from_dict(found)
    except Exception as error:  # strict dataclasses and nested configurations raise nearly anything
        raise CheckpointError(f"checkpoint {name}: config.json does not describe a model: {one_line(error)}") from error


def read_processor(name: str, source: str, options: dict[str, Any], config: FilaConfig) -> FilaProcessor:
    """The processor of a checkpoint that `locate` found; it has to fit the configuration."""
    try:
        processor = FilaProcessor.from_pretrained(source, **options)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        images = prompt.count(processor.image_token)
    except Exception as error:  # tokenizer files have many ways of being wrong
        raise CheckpointError(f"checkpoint {name}: its processor cannot be made: {one_line(error)}") from error
    if images != 1 or "What?" not in prompt:
        raise CheckpointError(
            f"checkpoint {name}: expected a chat template that gives the question and one {processor.image_token}, "
            f"got {one_line(repr(prompt))[:200]}"
        )
    wanted, got = config.vision_config.geometry(), processor.image_processor.geometry
    if wanted != got:
        raise CheckpointError(f"checkpoint {name}: expected a processor for the model's {wanted}, got one for {got}")
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"checkpoint {name}: expected a tokenizer with an image token of id {config.image_token_id}, "
            f"got {processor.image_token_id}"
        )
    embeddings, tokens = config.text_config.vocab_size, len(processor.tokenizer)
    if tokens > embeddings:
        raise CheckpointError(f"checkpoint {name}: expected a tokenizer of at most {embeddings} tokens, got {tokens}")
    return processor


def check_tensors(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Refuses a model whose tensors are not those of the checkpoint; `info` is `from_pretrained`'s loading info."""
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    found = [
        f"tensor {key}: expected shape {list(wanted)}, got {list(got)}"
        for key, got, wanted in sorted(info["mismatched_keys"])
    ]
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    found += [
        f"tensor {key}: expected shape {shapes.get(key, 'of the model')}, got no such tensor"
        for key in sorted(set(info["missing_keys"]) - mismatched)
    ]
    found += [f"tensor {key}: expected no such tensor, got one" for key in sorted(info["unexpected_keys"])]
    found += [one_line(message) for message in info["error_msgs"]]
    found += [
        f"tensor {key}: expected finite numbers, got NaN or infinity"
        for key, tensor in model.named_parameters()
        if key.endswith(".alpha") and not found and not torch.isfinite(tensor).all()
    ]
    _refuse(name, found)


def _refuse(name: str, found: list[str]) -> None:
    """Raises the faults found, if there are any; the first few by name."""
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise CheckpointError(f"checkpoint {name}: {'; '.join(found[:MOST_NAMED])}{more}")

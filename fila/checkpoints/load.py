"""Loads a checkpoint strictly: a folder becomes a model and its processor, complete or not at all."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from fila.checkpoints.check import Checkpoint, locate
from fila.checkpoints.config import read_config, read_generation_config
from fila.checkpoints.processor import read_processor
from fila.checkpoints.weights import build_empty, compare, open_tensors, read_weights, stored_dtype
from fila.configuration import FilaConfig
from fila.errors import memory_for
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor
from fila_kernels import dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str | None = None,
) -> tuple[FilaForConditionalGeneration, FilaProcessor]:
    """Loads model and processor of a checkpoint, complete or not at all.

    Args:
        path: a folder written by `save_pretrained`; `hf:owner/name` for the Hugging Face hub (nothing else here uses a
            network); None for the `fila-nano` that is shipped with the package.
        device: "auto" (a CUDA device if there is one), or what `torch.device` takes.
        dtype: "auto" (float32 on a CPU, the checkpoint's own elsewhere), "float32", "bfloat16" or "float16".
        backend: of the fusions, see `fila_kernels.dispatch.resolve`; None leaves it to the environment and the default.

    Raises:
        CheckpointError: a file is missing or damaged, another model's, or its tensors are not this model's.
        ValueError: device, dtype or backend cannot be had. RuntimeError: a backend asked for by name cannot run.
        MemoryError: the model does not fit.
    """
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    dispatch.resolve(backend)
    checkpoint = locate(path)
    with memory_for("the model"), open_tensors(checkpoint) as tensors:
        config, generation_config, processor = check(checkpoint, tensors)
        model = read_weights(checkpoint, config, tensors, chosen_dtype or stored_dtype(config, tensors))
        if generation_config is not None:
            model.generation_config = generation_config
        for fusion in model.model.vision_tower.fusion:
            fusion.use_backend(backend)
        return model.to(chosen_device).eval(), processor


def check(checkpoint: Checkpoint, tensors: dict[str, Any]) -> tuple[FilaConfig, GenerationConfig | None, FilaProcessor]:
    """Refuses a checkpoint whose files do not fit each other; reads everything but the numbers.

    Args:
        tensors: of the checkpoint, as `open_tensors` gives them; without tied ones afterwards.
    """
    config = read_config(checkpoint, len(tensors))
    generation_config = read_generation_config(checkpoint)
    compare(checkpoint, build_empty(checkpoint, config, len(tensors)), tensors)
    return config, generation_config, read_processor(checkpoint, config)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name, which has to be here.

    Raises:
        ValueError: an unknown name, or a device this machine or this build of torch does not have.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    if device == "auto":
        return torch.device("cuda" if "cuda" in here else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, {' or '.join(here)}, got {str(device)!r}") from error
    count = torch.accelerator.device_count() if found.type != "cpu" else 1
    if found.type not in here or (found.index or 0) >= count:
        built = "" if torch.version.cuda or found.type != "cuda" else " (this build of torch is for CPUs only)"
        raise ValueError(f"device: expected one that is here ({', '.join(here)}), got {str(device)!r}{built}")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype to load in, None for the checkpoint's own.

    Raises:
        ValueError: an unknown name, or float16 on a CPU, whose float16 products are some hundred times slower.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {str(dtype)!r}")
    if found == torch.float16 and device.type == "cpu":
        raise ValueError("dtype: expected float32 or bfloat16 on a CPU, got 'float16', which CPUs compute very slowly")
    assert found is not None
    return found

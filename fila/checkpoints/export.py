"""Takes a tower out of an assembled checkpoint again, under the names of the model that it came from."""

from pathlib import Path

import torch
from torch import Tensor

from fila.checkpoints.check import locate, shown
from fila.checkpoints.config import read_config
from fila.checkpoints.keys import CONVNEXT, LLAVA_NEXT, VIT
from fila.checkpoints.plan import vocabulary_names
from fila.checkpoints.shards import MANIFEST
from fila.checkpoints.sources import text_names
from fila.checkpoints.weights import build_empty, open_tensors


def export_tower(path: str | Path, role: str) -> dict[str, Tensor]:
    """The tensors of one source of an assembled checkpoint, trained since or not, under the source's names.

    Args:
        path: a folder written by `fila.checkpoints.assemble.assemble`, its manifest included.
        role: "vit", "convnext", "llm" or "llava-next", as the manifest names the sources.

    Returns:
        What was copied, of the source's shapes: without the rows of the image token. What was left is not there.

    Raises:
        CheckpointError: no checkpoint, or no manifest that names the source.
    """
    checkpoint = locate(path)
    manifest = checkpoint.read_object(MANIFEST)
    sources = manifest.get("sources")
    entry = sources.get(role) if isinstance(sources, dict) else None
    with open_tensors(checkpoint) as tensors:
        config = read_config(checkpoint, len(tensors))
        known = {layout.layout: layout for layout in (*VIT, *CONVNEXT, *LLAVA_NEXT, text_names(config.text_config))}
        key_map = known.get(str(entry.get("layout"))) if isinstance(entry, dict) else None
        if key_map is None:
            raise checkpoint.error(
                f"{MANIFEST}: expected a source {role} of a known layout, got {shown(repr(sources))}"
            )
        grown = vocabulary_names(build_empty(checkpoint, config, len(tensors)))
        parts: dict[str, dict[int, Tensor]] = {}
        for target, tensor in tensors.items():
            if found := key_map.source(target):
                name, part, _ = found
                parts.setdefault(name, {})[part] = tensor[: manifest["vocabulary"]] if target in grown else tensor[...]
    return {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}

"""Full-size models: every tensor of CLIP-L, ConvNeXt-L, LLaMA3-8B and LLaVA-NeXT has its place, and FILA lacks none.

The lists in keys/ were written by upstream's classes (tools/source_keys.py). Here they become files with true headers
and no numbers: sparse, so that they take no room.
"""

import gzip
import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from fila import FilaConfig, FilaVisionConfig, preset
from fila.checkpoints.check import Checkpoint
from fila.checkpoints.keys import CONVNEXT, LLAVA_NEXT, VIT
from fila.checkpoints.plan import match
from fila.checkpoints.sources import (
    Source,
    clip_vision,
    convnext_config,
    find_source,
    llava_next_config,
    text_config,
    text_names,
    vit_config,
)
from fila.checkpoints.weights import build_empty

KEYS = Path(__file__).parent / "keys"


def source_of(name: str, role: str, folder: Path) -> Source:
    """A list of names as a folder that `find_source` finds."""
    found = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    folder = folder / name
    folder.mkdir()
    for file, settings in found["settings"].items():
        (folder / file).write_text(json.dumps(settings))
    header, end = {}, 0
    for key, (dtype, shape) in found["tensors"].items():
        size = prod(shape) * (4 if dtype == "F32" else 2)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    if role == "llm":
        return find_source(role, folder, [text_names(text_config(Checkpoint(role, folder)))])
    return find_source(role, folder, {"vit": VIT, "convnext": CONVNEXT, "llava-next": LLAVA_NEXT}[role])


def check(config: FilaConfig, sources: list[Source], vocabulary: int) -> None:
    """Every tensor is copied, left or new, and the model is the paper's but for its vocabulary."""
    vision = config.vision_config
    sources = [replace(one, key_map=one.key_map.without_layers(vision.num_vit_layers, 24)) for one in sources]
    model = build_empty(Checkpoint("fila", Path()), config, 2000)
    pieces, fresh, faults = match(model, sources, vocabulary)
    assert faults == []
    for one in sources:
        for name in one.headers:
            targets = one.key_map.targets(name)
            assert bool(targets) != one.key_map.leaves(name), name
            assert all(pieces[target].name == name for target in targets)
    paper = build_empty(Checkpoint("fila", Path()), preset("fila-llama3-8b"), 2000).state_dict()
    assert {*pieces, *fresh} == set(paper)
    assert {name for name in paper if paper[name].shape != model.state_dict()[name].shape} == {
        "model.language_model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip


@pytest.mark.parametrize("vit", ["clip-vit-large-patch14-336", "open-clip-vit-l-14-336"])
def test_the_papers_three_sources(vit, tmp_path):
    towers = [source_of(vit, "vit", tmp_path), source_of("open-clip-convnext-large", "convnext", tmp_path)]
    llm = source_of("llama3-8b", "llm", tmp_path)
    text = text_config(llm.files)
    text.vocab_size = 128320
    vision = FilaVisionConfig(vit_config=vit_config(towers[0]), convnext_config=convnext_config(towers[1]))
    assert vision.vit_config.hidden_act == "quick_gelu"
    check(FilaConfig(vision_config=vision, text_config=text), [*towers, llm], 128256)


def test_llava_next(tmp_path):
    llava = source_of("llava-next-llama3-8b", "llava-next", tmp_path)
    tower = source_of("open-clip-convnext-large", "convnext", tmp_path)
    found = llava_next_config(llava.files)
    vision = FilaVisionConfig(
        vit_config=clip_vision(llava.files, found.vision_config.to_dict()), convnext_config=convnext_config(tower)
    )
    check(FilaConfig(vision_config=vision, text_config=found.text_config), [llava, tower], 128320)


def test_a_name_that_no_table_has_is_found(tmp_path):
    tower = source_of("open-clip-convnext-large", "convnext", tmp_path)
    name = "visual.trunk.stages.3.blocks.2.grn.weight"
    assert not tower.key_map.targets(name)
    assert not tower.key_map.leaves(name)

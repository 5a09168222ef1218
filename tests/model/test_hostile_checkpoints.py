"""Checkpoints written by an attacker, of the fuzz's list: endless templates, panics, doubled keys, deep JSON."""

import os
import sys
import time

import pytest

from fila.checkpoints.template import MOST_SECONDS
from fila.inference import CheckpointError, load
from tests.fuzz.hostile_folders import TEMPLATES, folders

FOLDERS = dict(folders())
REFUSED = {
    "template: endless": "takes at most 5 seconds",
    "template: endless filter": "takes at most 5 seconds",
    "template: power": r"computes no powers, got one with \*\*",
    "template: classes": "its processor cannot be made",
    "template: include": "its processor cannot be made",
    "tokenizer.json: normalizer {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}": "Cannot parse precompiled",
    "config.json: nested lists": "config.json cannot be read",
    "config.json: doubled key": "expected model_type \"fila\", got 'llava'",
    "config.json: text_config.vocab_size 1000000000": r"expected shape \[1000000000, 192\]",
    "config.json: text_config.num_hidden_layers 100000": "num_hidden_layers to fit a checkpoint of",
    "index: up": "expected names of safetensors files in the folder",
    "a shard that is a link": "leads out of it",
    "pickle": "expected one layout of weights",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_folder_is_refused(copy, name):
    FOLDERS[name](copy)
    start, before = time.thread_time(), sys.gettrace()
    with pytest.raises(CheckpointError, match=REFUSED[name]) as refused:
        load(copy, device="cpu")
    assert str(refused.value).isprintable()
    assert time.thread_time() - start < MOST_SECONDS + 5
    assert sys.gettrace() is before
    assert not any(file.name == "ran" for file in (*copy.iterdir(), *os.scandir()))


def test_the_list_has_one_name_per_entry():
    assert len(FOLDERS) == len(list(folders()))
    assert "**" in TEMPLATES["power"]

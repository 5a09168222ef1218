"""What cannot be assembled is named at once and leaves no trace; what was interrupted goes on to the same bytes."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fila.checkpoints.assemble import assemble
from fila.checkpoints.check import CheckpointError
from fila.checkpoints.shards import partial_folder
from tests.model.source_models import save_convnext, save_llava_next, save_llm, save_vit

WEIGHTS = "model.safetensors"


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    save_vit(folder / "vit")
    save_convnext(folder / "convnext")
    save_llm(folder / "llm", "smollm2")
    return folder


@pytest.fixture
def sources(originals, tmp_path) -> Path:
    """Sources to damage."""
    return Path(shutil.copytree(originals, tmp_path / "sources"))


def refusal(sources: Path, out: Path, **changed: Path) -> str:
    """The message of an assembly that is refused, without a trace in the sources or beside the result."""
    before = {folder.name: sums(folder) for folder in sources.iterdir()}
    paths = {role: sources / role for role in ("vit", "convnext", "llm")} | changed
    with pytest.raises(CheckpointError) as caught:
        assemble(out, **paths)
    assert before == {folder.name: sums(folder) for folder in sources.iterdir()}
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_that_does_not_fit_is_named_in_one_message(sources, tmp_path):
    path = sources / "convnext" / WEIGHTS
    tensors = load_file(path)
    stem = "convnext.encoder.stages.0.layers.0."
    del tensors[stem + "dwconv.bias"]
    tensors[stem + "extra"] = torch.zeros(3)
    tensors[stem + "pwconv1.weight"] = torch.zeros(16, 5)
    tensors[stem + "pwconv2.weight"] = tensors[stem + "pwconv2.weight"].half()
    tensors["convnext.encoder.stages.1.layers.0.dwconv.bias"][2] = torch.nan
    tensors["classifier.weight"][0] = torch.nan  # is left, hence may be anything
    save_file(tensors, path)
    path = sources / "llm" / WEIGHTS
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = -torch.inf
    save_file(tensors, path)
    message = refusal(sources, tmp_path / "out")
    for fault in (
        f"tensor {stem}dwconv.bias: expected shape [4], got no such tensor",
        f"tensor {stem}extra: expected no such tensor, got one",
        f"tensor {stem}pwconv1.weight: expected shape [16, 4], got [16, 5]",
        f"tensor {stem}pwconv2.weight: expected dtype F32, as most of its source, got F16",
        "tensor convnext.encoder.stages.1.layers.0.dwconv.bias: expected finite numbers in torch.float32, got NaN",
        "tensor model.norm.weight: expected finite numbers",
    ):
        assert fault in message
    assert "classifier" not in message
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    "role, given, message",
    [
        ("vit", "convnext", "expected tensors of CLIPModel of transformers"),
        ("convnext", "vit", "expected tensors of open_clip, ConvNeXt of timm"),
        ("llm", "vit", "expected a causal language model of transformers, got model_type 'clip'"),
        ("vit", "nowhere", "expected a folder, got none"),
    ],
)
def test_another_model_is_refused(sources, tmp_path, role, given, message):
    assert message in refusal(sources, tmp_path / "out", **{role: sources / given})


def test_another_models_tokenizer_is_refused(sources, tmp_path):
    config = json.loads((sources / "llm" / "config.json").read_text())
    (sources / "llm" / "config.json").write_text(json.dumps(config | {"eos_token_id": 77}))
    message = refusal(sources, tmp_path / "out")
    assert "expected the model's own tokenizer, where eos_token_id 77 is a special token" in message
    save_llm(tmp_path / "other", "llama3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tmp_path / "other" / name, sources / "llm" / name)
    assert "expected a tokenizer of at most 259 tokens, got one with token 260" in refusal(sources, tmp_path / "out")


def test_a_llava_next_with_another_image_token_is_refused(originals, tmp_path):
    save_llava_next(tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["image_token_index"] -= 1
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected a tokenizer with <image> of id"):
        assemble(tmp_path / "out", llava_next=tmp_path / "llava", convnext=originals / "convnext")


def test_a_file_that_is_cut_is_refused(sources, tmp_path):
    path = sources / "vit" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert f"expected a complete safetensors file {WEIGHTS}" in refusal(sources, tmp_path / "out")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", [Evil(), [torch.zeros(2)], {"a": 1}, {"state_dict": {"a": torch.zeros(2)}}])
def test_pickles_that_are_no_state_dict_are_refused(sources, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (sources / "vit" / WEIGHTS).unlink()
    torch.save(content, sources / "vit" / "pytorch_model.bin", pickle_module=pickle)
    message = refusal(sources, tmp_path / "out")
    assert "pytorch_model.bin: expected" in message
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_nothing_under_the_final_name_and_the_next_try_goes_on(sources, tmp_path):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        message = refusal(sources, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "expected files that can be written, got:" in message
    assert "goes on from" in message
    assert not list(partial_folder(out).glob("*.index.json"))
    assemble(out, **{role: sources / role for role in ("vit", "convnext", "llm")})
    assert not partial_folder(out).exists()


# Runs in a process of its own, which has computed nothing: its children are forked, and killed at their n-th event.
KILLED = """
import os, signal, sys
from pathlib import Path
from fila.checkpoints.assemble import assemble
from fila.checkpoints.plan import Piece

sources, out = Path(sys.argv[1]), Path(sys.argv[2])

def attempt(last):
    events = iter(range(last))
    def counted(function):
        def call(*arguments, **keywords):
            if next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    if last:
        os.replace, os.fsync, os.rename = counted(os.replace), counted(os.fsync), counted(os.rename)
        Piece.read = counted(Piece.read)  # in the middle of a file
    assemble(out, vit=sources / "vit", convnext=sources / "convnext", llm=sources / "llm", shard_bytes=40_000)

for last in [*map(int, sys.argv[3:]), 0]:
    child = os.fork()
    if not child:
        attempt(last)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = out.with_name(f".{out.name}.partial")
    done = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")} if folder.exists() else {}
    print(last, code, len(done), out.exists(), flush=True)
"""


@pytest.mark.slow
def test_ten_kills_and_resumes_give_the_same_bytes(sources, tmp_path, root):
    moments = [2, 9, 23, 36, 40, 44, 48, 52, 56, 60]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(sources), str(tmp_path / "killed"), *map(str, moments)],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[1], line[3]) for line in lines] == [("-9", "False")] * len(moments) + [("0", "True")]
    finished = [int(line[2]) for line in lines[:-1]]
    assert finished == sorted(finished)  # what is finished stays
    assert finished[-1] > finished[0]
    assemble(
        tmp_path / "whole", vit=sources / "vit", convnext=sources / "convnext", llm=sources / "llm", shard_bytes=40_000
    )
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")

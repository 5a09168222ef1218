"""Loading is complete or an error: one list of data files in the folder, compared with the model before it is read."""

import json
import logging
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from fila import FilaForConditionalGeneration, FilaProcessor
from fila.checkpoints.check import GENERATION, REQUIRED_FILES, WEIGHTS, WEIGHTS_INDEX, locate
from fila.checkpoints.config import read_config
from fila.checkpoints.quiet import quiet
from fila.checkpoints.weights import build_empty, compare, open_tensors
from fila.inference import CheckpointError, load

TENSOR = "model.image_newline"
ALPHA = "model.vision_tower.fusion.0.alpha"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def rewrite(folder: Path, change) -> None:
    """Saves the weights anew after `change` has been at them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_what_was_saved_is_loaded(checkpoint, loaded):
    model, processor = loaded
    saved = load_file(checkpoint / WEIGHTS)
    state = model.state_dict()
    assert set(saved) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in saved.items())
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.image_processor.geometry == model.config.vision_config.geometry()


def test_dtype_and_backend_are_those_asked_for(checkpoint):
    model, _ = load(str(checkpoint), dtype="bfloat16", device="cpu", backend="reference")
    assert model.dtype == torch.bfloat16
    assert [fusion.backend for fusion in model.model.vision_tower.fusion] == ["reference"] * 4


def test_a_local_folder_needs_no_network(checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local checkpoint reached for the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(TENSOR), rf"tensor {TENSOR}: expected shape \[192\], got no such tensor"),
        (lambda t: t.update({TENSOR: t[TENSOR][:100].clone()}), rf"{TENSOR}: expected shape \[192\], got \[100\]"),
        (lambda t: t.update({"extra": torch.zeros(3)}), "tensor extra: expected no such tensor, got one"),
        (lambda t: t.update({TENSOR: t[TENSOR].long()}), f"{TENSOR}: expected dtype F32, F16, BF16, F64, got I64"),
        (lambda t: t.update({TENSOR: t[TENSOR].to(torch.int8)}), f"{TENSOR}: expected dtype .*, got I8"),
        (lambda t: t.update({TENSOR: t[TENSOR] > 0}), f"{TENSOR}: expected dtype .*, got BOOL"),
        (lambda t: t.update({TENSOR: t[TENSOR].to(torch.float8_e4m3fn)}), f"{TENSOR}: expected dtype .*, got F8"),
        (lambda t: t.update({ALPHA: torch.full_like(t[ALPHA], torch.nan)}), f"{ALPHA}: expected finite numbers"),
        (lambda t: [t.pop(name) for name in list(t) if "fusion" in name], "fusion.3.fc2.weight: expected shape"),
        (lambda t: t.update({TENSOR: torch.zeros(0)}), rf"{TENSOR}: expected shape \[192\], got \[0\]"),
        (lambda t: t.update({"a\n\x1b[31m": torch.zeros(1)}), r"tensor a\\n\\x1b\[31m: expected no such"),
    ],
    ids=["missing", "misshaped", "unexpected", "int64", "int8", "bool", "fp8", "alpha", "many", "empty", "name"],
)
def test_wrong_tensors_are_named(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize("kept", [0, 5, 2000, 5_000_000])
def test_truncated_weights(copy, kept):
    data = (copy / WEIGHTS).read_bytes()[:kept]
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"expected a complete safetensors file {WEIGHTS}, got"):
        load(copy)


@pytest.mark.parametrize("file", [*REQUIRED_FILES, WEIGHTS])
def test_missing_files(copy, file):
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=f"expected a file {file}"):
        load(copy)


def test_a_missing_shard(copy):
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {TENSOR: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        load(copy)
    (copy / WEIGHTS_INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_INDEX}: expected an object, got list"):
        load(copy)


def test_configurations_of_something_else(copy):
    edit(copy / "config.json", model_type="llava_next")
    with pytest.raises(CheckpointError, match="expected model_type \"fila\", got 'llava_next'"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load(copy)


def test_a_configuration_that_fits_nothing(copy):
    vision = json.loads((copy / "config.json").read_text())["vision_config"]
    edit(copy / "config.json", vision_config=vision | {"fusion_layers": [1, 2]})
    with pytest.raises(CheckpointError, match="fusion_layers must name 4"):
        load(copy)


def test_a_processor_for_another_model(copy):
    found = json.loads((copy / "processor_config.json").read_text())
    found["image_processor"]["high_res_rule"] = "fixed"
    (copy / "processor_config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="expected a processor for the model's"):
        load(copy)


def test_a_tokenizer_for_another_model(copy):
    edit(copy / "config.json", image_token_index=5)
    with pytest.raises(CheckpointError, match="image token of id 5, got 4"):
        load(copy)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "[]", "config.json: expected an object, got list"),
        ("chat_template.jinja", "{{ nothing.at_all }}", "its processor cannot be made"),
        ("chat_template.jinja", "{% if %}", "its processor cannot be made"),
        ("chat_template.jinja", "What?", "one <image>, got 'What\\?'"),
        (GENERATION, "{", f"{GENERATION} cannot be read"),
        (GENERATION, "[]", f"{GENERATION}: expected an object, got list"),
        (GENERATION, '{"eos_token_id": "2"}', "eos_token_id as a token's number"),
        ("config.json", '{"model_type": "fila", "x": NaN}', "expected finite numbers, got NaN"),
        ("config.json", '{"model_type": "fila", "x": 1e999}', "expected finite numbers, got 1e999"),
        ("config.json", '{"a":' * 100000, "config.json cannot be read"),
        ("tokenizer.json", "{}", "its tokenizer cannot be made"),
        (WEIGHTS_INDEX, '{"weight_map": {"a": 5}}', "expected names of files, got 5"),
    ],
)
def test_damaged_files(copy, file, content, message):
    (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_processor_with_a_size_that_is_none(copy):
    found = json.loads((copy / "processor_config.json").read_text())
    found["image_processor"]["max_image_side"] = "x"
    (copy / "processor_config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="max_image_side to be a whole number of at least 1, got 'x'"):
        load(copy)


@pytest.mark.parametrize("method", ["bitsandbytes", "foo"])
def test_quantized_weights_are_refused(copy, method):
    edit(copy / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(CheckpointError, match=f"not quantized, got quant_method '{method}'"):
        load(copy)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: full")])
def test_no_memory_for_the_model(checkpoint, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(FilaForConditionalGeneration, "to", refuse)
    with pytest.raises(MemoryError, match=r"expected enough memory for the model, got: .*full"):
        load(checkpoint)


@pytest.mark.parametrize(
    "path, message",
    [("no/folder", "hf:no/folder would fetch it"), (__file__, "expected a folder, got a file"), ("", "expected a")],
)
def test_paths_that_hold_no_checkpoint(path, message):
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "abacus"}, "device: expected auto, cpu"),
        ({"device": "meta"}, "device: expected one that is here"),
        ({"device": "cuda:99"}, "device: expected one that is here"),
        ({"dtype": "int8"}, "dtype: expected auto, float32"),
        ({"dtype": "float16", "device": "cpu"}, "dtype: expected float32 or bfloat16 on a CPU"),
        ({"backend": "abacus"}, "backend: expected one of"),
    ],
)
def test_what_cannot_be_had(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **options)


# --- one list of files


def shard(folder: Path, homes=lambda name: SHARDS[name < "model.vision"], **index) -> dict[str, str]:
    """Stores the weights in two files with an index, which `index` changes."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for file in SHARDS:
        save_file({n: t for n, t in tensors.items() if file in homes(n)}, folder / file, metadata={"format": "pt"})
    weight_map = {name: homes(name).split()[0] for name in tensors} | index
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_weights_in_two_files(copy, loaded):
    shard(copy)
    found, expected = load(copy)[0].state_dict(), loaded[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_in_two_files(copy):
    shard(copy, lambda name: " ".join(SHARDS) if name == TENSOR else SHARDS["convnext" in name])
    with pytest.raises(
        CheckpointError, match=f"tensor {TENSOR}: expected it in {SHARDS[0]}, got it in .* and {SHARDS[1]}"
    ):
        load(copy)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({TENSOR: SHARDS[0]}, f"{TENSOR}: expected it in {SHARDS[0]}, got it in {SHARDS[1]}"),
        ({"extra": SHARDS[0]}, f"extra: expected it in {SHARDS[0]}, got it in no file"),
        ({TENSOR: "../model.safetensors"}, "safetensors files in the folder, got '../model.safetensors'"),
        ({TENSOR: "/tmp/model.safetensors"}, "in the folder, got '/tmp/model.safetensors'"),
        ({TENSOR: "training/model.safetensors"}, "in the folder, got 'training/"),
        ({TENSOR: "weights.bin"}, "safetensors files in the folder, got 'weights.bin'"),
        ({TENSOR: "other.safetensors"}, "expected a file other.safetensors, got none"),
    ],
)
def test_an_index_that_is_wrong(copy, entry, message):
    shard(copy, lambda name: SHARDS["convnext" in name or name == TENSOR], **entry)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize(
    "file",
    [
        "pytorch_model.bin", "pytorch_model.bin.index.json", SHARDS[0], "model.fp16.safetensors", "model.gguf",
        "adapter_config.json", "adapter_model.safetensors", "chat_template.json", WEIGHTS_INDEX,
    ],
)  # fmt: skip
def test_two_layouts_of_weights_or_templates(copy, file):
    weight_map = dict.fromkeys(load_file(copy / WEIGHTS), "a.safetensors")
    shutil.copy(copy / WEIGHTS, copy / "a.safetensors")
    (copy / file).write_text(json.dumps({"weight_map": weight_map}))
    beside = WEIGHTS if file == WEIGHTS_INDEX else file
    with pytest.raises(
        CheckpointError, match=f"expected one layout of weights and one chat template, .*got {beside} beside"
    ):
        load(copy)


@pytest.mark.parametrize("file", [*REQUIRED_FILES, WEIGHTS, "chat_template.jinja", GENERATION])
def test_links_that_lead_out_of_the_folder(copy, tmp_path, file):
    shutil.move(copy / file, tmp_path / file)
    (copy / file).symlink_to(tmp_path / file)
    with pytest.raises(CheckpointError, match=f"expected a file {file} in the folder, got a link that leads out"):
        load(copy)


def test_links_within_the_folder_and_of_the_hub_s_cache(copy, tmp_path):
    (copy / "config.json").rename(copy / "mine.json")
    (copy / "config.json").symlink_to("mine.json")
    load(copy)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    shutil.copytree(copy, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load(snapshot)


def test_a_name_of_the_hub_is_never_a_local_folder(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "owner").mkdir(exist_ok=True)
    shutil.copytree(checkpoint, checkpoint.parent / "owner" / "name", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="hf:owner/name: it cannot be fetched"):
        load("hf:owner/name")
    for path in ("hf:", "hf:name", "hf:../name", "hf:/tmp/name", "hf:owner/name/more"):
        with pytest.raises(CheckpointError, match="expected hf:owner/name"):
            load(path)


def test_a_name_of_the_hub_is_checked_like_a_folder(copy, loaded, monkeypatch):
    def snapshot(name, allow_patterns, ignore_patterns):
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        return str(copy)

    monkeypatch.setattr("fila.checkpoints.check.snapshot_download", snapshot)
    assert torch.equal(load("hf:owner/name")[0].state_dict()[TENSOR], loaded[0].state_dict()[TENSOR])
    rewrite(copy, lambda tensors: tensors.pop(TENSOR))
    with pytest.raises(CheckpointError, match="checkpoint hf:owner/name: tensor"):
        load("hf:owner/name")


# --- data, never code

CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["e.Evil"]}}, "no code"),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}, "tokenizer_class that transformers has, got 'Evil'"),
        ("tokenizer_config.json", {"tokenizer_class": None}, "name of a tokenizer_class, got None"),
        ("tokenizer_config.json", {"tokenizer_file": "/tmp/tokenizer.json"}, "tokenizer_file left out"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files left out"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "x"}]}, "one chat_template"),
        ("processor_config.json", {"processor_class": "Evil"}, "processor_class 'FilaProcessor', got 'Evil'"),
        ("processor_config.json", {"video_processor": {}}, "setting that FILA's processor has, got video_processor"),
        ("config.json", {"configuration_files": ["config.4.0.json"]}, "configuration_files left out"),
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights left out"),
        ("config.json", {"attn_implementation": "kernels-community/flash-attn"}, "a checkpoint names no kernels"),
        ("config.json", {"_attn_implementation": {"text_config": "a/b:c"}}, "a checkpoint names no kernels"),
        ("config.json", {"fusion_config": {"patch_embeddings": True}}, "fusion_config left out"),
        (GENERATION, {"custom_generate": "a/b"}, "custom_generate left out"),
    ],
)  # fmt: skip
def test_nothing_that_would_run_or_lead_elsewhere(copy, file, values, message):
    (copy / "evil.py").write_text(CODE)
    edit(copy / file, **values)
    with pytest.raises(CheckpointError, match=message):
        load(copy)
    assert not (copy / "ran").exists()


def test_settings_that_say_where_classes_are_do_not_count(copy, loaded, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a checkpoint asked a question"))
    (copy / "evil.py").write_text(CODE)
    for file in ("config.json", "processor_config.json"):
        edit(copy / file, auto_map={"AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}, _name_or_path="/nowhere")
    edit(copy / "tokenizer_config.json", auto_map={"AutoProcessor": "evil.Evil"})
    model, _ = load(copy)
    assert torch.equal(model.state_dict()[TENSOR], loaded[0].state_dict()[TENSOR])
    assert not (copy / "ran").exists()
    assert model.name_or_path == str(copy)


def test_the_processor_is_transformers_own(checkpoint, loaded):
    expected = FilaProcessor.from_pretrained(checkpoint)
    assert loaded[1].to_dict() == expected.to_dict()
    assert loaded[1].chat_template == expected.chat_template
    assert loaded[1].tokenizer.backend_tokenizer.to_str() == expected.tokenizer.backend_tokenizer.to_str()


def test_the_model_is_transformers_own(checkpoint, loaded):
    expected = FilaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    for found, wanted in (
        (loaded[0].named_buffers(), expected.named_buffers()),
        (loaded[0].state_dict().items(), expected.state_dict().items()),
    ):
        found, wanted = dict(found), dict(wanted)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert loaded[0].generation_config.to_dict() == expected.generation_config.to_dict()


def test_every_difference_is_named(copy):
    gone: list[str] = []

    def change(tensors):
        gone.extend(name for name in tensors if "fusion" in name)
        for name in gone:
            del tensors[name]

    rewrite(copy, change)
    with pytest.raises(CheckpointError) as error:
        load(copy)
    assert len(gone) == 20
    assert all(f"tensor {name}: expected shape" in str(error.value) for name in gone)


# --- sizes and types


def edit_part(folder: Path, path: str, value) -> None:
    """Writes one setting of `config.json`, given as `part.part.name`."""
    whole = config = json.loads((folder / "config.json").read_text())
    *parts, name = path.split(".")
    for part in parts:
        config = config[part]
    config.pop(name, None)
    if value is not ...:
        config[name] = value
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("text_config.vocab_size", 10**9, rf"{EMBEDDING}: expected shape \[1000000000, 192\], got \[102, 192\]"),
        ("text_config.num_hidden_layers", 10**5, "num_hidden_layers to fit a checkpoint of 270 tensors, got 100000"),
        ("text_config.num_hidden_layers", 10**9, "num_hidden_layers to fit a checkpoint of 270 tensors"),
        ("text_config.num_hidden_layers", 100, r"layers.20.mlp.up_proj.weight: expected shape \[512, 192\]"),
        ("text_config.hidden_size", 10**6, "expected shape"),
        ("text_config.num_labels", 10**9, "num_labels to fit a checkpoint of no more than a million"),
        ("text_config", ..., "expected an object text_config, got None"),
        ("vision_config", ..., "expected an object vision_config, got None"),
        ("vision_config.vit_config.num_hidden_layers", 10**6, "num_hidden_layers to fit a checkpoint"),
        ("vision_config.vit_config.image_size", 10**9 + 7, "."),
        ("vision_config.convnext_config.depths", [2, 2, 10**6, 2], "depths to fit a checkpoint of 270 tensors"),
        ("vision_config.convnext_config.hidden_sizes", [32, 64, 128, 10**8], "expected shape"),
        ("vision_config.image_grid_pinpoints", [[96 * 10**6, 96]], "a canvas of at most 32768 pixels per side"),
        ("vision_config.high_res_size", 16 * 10**6, "."),
        ("vision_config.fusion_hidden_size", 10**9, r"fusion.0.fc1.weight: expected shape \[1000000000"),
        ("text_config.num_attention_heads", -1, "num_attention_heads as a whole number of at least 1, got -1"),
        ("text_config.num_attention_heads", 4.0, "num_attention_heads as a whole number of at least 1, got 4.0"),
        ("text_config.num_attention_heads", True, "num_attention_heads as a whole number of at least 1, got True"),
        ("text_config.num_key_value_heads", 3, "num_key_value_heads"),
        ("text_config.hidden_size", "192", "hidden_size as a whole number of at least 1, got '192'"),
        ("text_config.rms_norm_eps", "x", "rms_norm_eps"),
        ("text_config.hidden_act", "abacus", "abacus"),
        ("text_config.model_type", "abacus", "model_type that transformers knows, got 'abacus'"),
        ("text_config.eos_token_id", "2", "eos_token_id"),
        ("text_config.dtype", "int8", "dtype out of float32, bfloat16, float16, float64, got 'int8'"),
        ("text_config.quantization_config", {"quant_method": "x"}, "quantization_config left out"),
        ("vision_config.vit_config.num_attention_heads", -1, "num_attention_heads in whole numbers of at least 1"),
        ("vision_config.vit_config.patch_size", 8.0, "patch_size"),
        ("vision_config.image_grid_pinpoints", [[64.5, 128]], "whole numbers, got .*64.5"),
        ("vision_config.image_grid_pinpoints", 5, "config.json does not describe a model"),
        ("image_token_index", 10**9, "image token of id 1000000000"),
    ],
)  # fmt: skip
def test_absurd_sizes_and_wrong_types_are_named_at_once(copy, path, value, message):
    edit_part(copy, path, value)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        load(copy)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tile_size", 64.0, "tile_size to be a whole number of at least 1, got 64.0"),
        ("patch_size", "8", "patch_size to be a whole number"),
        ("high_res_stride", True, "high_res_stride to be a whole number"),
        ("resample", -1, "resample to be a whole number"),
        ("image_grid_pinpoints", [[64, 128.0]], "image_grid_pinpoints as pairs of whole numbers"),
        ("image_grid_pinpoints", {"a": 1}, "image_grid_pinpoints as pairs of whole numbers"),
        ("do_high_res", "yes", "do_high_res to be bool, got 'yes'"),
        ("do_high_res", False, "expected do_high_res for a model that fuses"),
        ("image_mean", [0.5], "image_mean to be three numbers"),
        ("preprocess", "x", "setting that FILA's processor has, got preprocess"),
        ("image_processor_type", "Abacus", "image_processor_type 'FilaImageProcessor', got 'Abacus'"),
    ],
)
def test_settings_of_the_processor_of_a_wrong_type(copy, name, value, message):
    found = json.loads((copy / "processor_config.json").read_text())
    found["image_processor"][name] = value
    (copy / "processor_config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_table_that_fits_no_weights(checkpoint):
    """Tables that are computed and not stored, of positions for instance, have no shape in the files."""
    found = locate(checkpoint)
    with open_tensors(found) as tensors:
        model = build_empty(found, read_config(found, len(tensors)), len(tensors))
        compare(found, model, dict(tensors))
        model.register_buffer("table", torch.empty(2**40, device="meta"), persistent=False)
        with pytest.raises(CheckpointError, match="table: expected a table that fits the weights"):
            compare(found, model, tensors)


def test_building_stops_where_a_configuration_outgrows_the_weights(checkpoint):
    found = locate(checkpoint)
    config = read_config(found, 270)
    config.text_config.num_hidden_layers = 10**7
    with pytest.raises(CheckpointError, match="at most 1270 tensors, 270 of them stored, got one of more"):
        build_empty(found, config, 270)
    torch.nn.Linear(1, 1)  # in peace


def test_a_head_beside_the_embedding_that_it_is_tied_to(copy, loaded):
    rewrite(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    model, _ = load(copy)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    rewrite(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    with pytest.raises(CheckpointError, match=f"tensor {HEAD}: expected the numbers of {EMBEDDING}"):
        load(copy)


def test_numbers_that_are_none(copy):
    rewrite(copy, lambda tensors: tensors[EMBEDDING][3].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=f"tensor {EMBEDDING}: expected finite numbers in torch.float32"):
        load(copy)


@pytest.mark.parametrize("length", [2**62, 2**20, 0])
def test_a_header_that_lies_about_its_length(copy, length):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        load(copy)


def test_a_file_too_large_to_be_text(copy):
    os.truncate(copy / "config.json", 2**40)
    with pytest.raises(CheckpointError, match=r"config\.json: expected at most 16777216 bytes, got 1099511627776"):
        load(copy)


def test_a_language_model_that_is_stored_under_other_names(tmp_path, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    small = {
        "model_type": "mixtral", "vocab_size": 102, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    config = FilaForConditionalGeneration.config_class(
        vision_config=config["vision_config"], text_config=small, image_token_index=4
    )
    torch.manual_seed(0)
    model = FilaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    FilaProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    found = load(tmp_path)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


# --- threads


def test_threads_load_at_the_same_time(checkpoint, loaded):
    verbosity, dtype = transformers_logging.get_verbosity(), torch.get_default_dtype()
    bars = transformers_logging.is_progress_bar_enabled()
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda kind: load(checkpoint, dtype=kind)[0], ["float32", "bfloat16"] * 2))
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16] * 2
    assert torch.equal(models[-2].state_dict()[TENSOR], loaded[0].state_dict()[TENSOR])
    assert (transformers_logging.get_verbosity(), torch.get_default_dtype()) == (verbosity, dtype)
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_silence_is_the_loading_thread_s_own():
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    listener, logger = Listener(), transformers_logging.get_logger("transformers")
    logger.addHandler(listener)
    try:
        with quiet(), ThreadPoolExecutor(1) as threads:
            logger.warning("mine")
            threads.submit(logger.warning, "another's").result()
        logger.warning("afterwards")
    finally:
        logger.removeHandler(listener)
    assert said == ["another's", "afterwards"]
    assert not listener.filters

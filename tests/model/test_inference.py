"""Loading is complete or an error, and an answer carries its plan, backend and times."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fila import FilaForConditionalGeneration
from fila.checkpoints.check import GENERATION, REQUIRED_FILES, WEIGHTS, WEIGHTS_INDEX
from fila.geometry import Geometry
from fila.images import ImageError, read_picture
from fila.inference import CheckpointError, answer, answer_batch, load
from tests.model.tiny_checkpoint import save_checkpoint

TENSOR = "model.image_newline"
ALPHA = "model.vision_tower.fusion.0.alpha"


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint to damage; its weights are a link until a test replaces them."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name == WEIGHTS:
            (folder / WEIGHTS).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Saves the weights anew after `change` has been at them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def picture(height: int = 200, width: int = 300) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# --- loading


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
        (lambda t: [t.pop(name) for name in list(t) if "fusion" in name], "and 17 more"),
    ],
    ids=["missing", "misshaped", "unexpected", "int64", "int8", "bool", "fp8", "alpha", "many"],
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
    (copy / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {TENSOR: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        load(copy)
    (copy / WEIGHTS_INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_INDEX} cannot be read"):
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
        (GENERATION, "[]", f"{GENERATION} cannot be read"),
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
    with pytest.raises(CheckpointError, match="max_image_side to be a whole number"):
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


# --- answers


def test_answers_do_not_depend_on_how_a_checkpoint_would_generate(copy, loaded):
    own = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    (copy / GENERATION).write_text(json.dumps({**own, "eos_token_id": None, "suppress_tokens": list(range(5, 60))}))
    model, processor = load(copy)
    expected, found = (answer(*pair, picture(), "What?", max_new_tokens=6) for pair in (loaded, (model, processor)))
    assert found.text == expected.text
    assert model.generation_config.repetition_penalty == 9.0


def test_an_answer_says_how_it_came_about(loaded):
    model, processor = loaded
    found = answer(model, processor, picture(200, 300), "What is the total?", max_new_tokens=2, name="a picture")
    geometry: Geometry = processor.image_processor.geometry
    layout = geometry.layout(200, 300)
    assert (found.picture, found.question, found.image_size) == ("a picture", "What is the total?", (200, 300))
    assert (found.canvas, found.tiles) == (layout.canvas, (layout.rows, layout.columns))
    assert (found.visual_tokens, found.tiles_reach_llm) == (layout.num_tokens, True)
    assert set(found.seconds) == {"preprocess", "encode", "generate"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.backend["choice"] in ("native", "eager")
    assert [stage["vit_layer"] for stage in found.backend["stages"]] == [1, 2, 4, 5]
    assert all(stage["forward"]["why"] for stage in found.backend["stages"])
    again = answer(model, processor, picture(200, 300), "What is the total?", max_new_tokens=2)
    assert again.text == found.text


def test_several_pictures_in_one_batch(loaded):
    model, processor = loaded
    found = answer_batch(
        model, processor, [picture(60, 60), picture(50, 400)], ["Date?", "Total?"], max_new_tokens=2, names=["a", None]
    )
    assert [one.question for one in found] == ["Date?", "Total?"]
    assert [one.picture for one in found] == ["a", "PIL image of mode RGB"]
    assert [one.tiles for one in found] == [(1, 2), (1, 3)]
    assert answer_batch(model, processor, [], []) == []
    with pytest.raises(ValueError, match="one question a picture"):
        answer_batch(model, processor, [picture()], [])


def test_answers_are_what_generate_says(loaded):
    """The decoding here and transformers' own, which users call, give the same tokens."""
    model, processor = loaded
    pictures, questions = [picture(60, 60), picture(50, 400)], ["Date?", "What is the total?"]
    found = answer_batch(model, processor, pictures, questions, max_new_tokens=6)
    for image, one in zip(pictures, found, strict=True):
        inputs = processor(images=image, text=f"<bos><user><image>{one.question}<assistant>", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(out, skip_special_tokens=True).strip() == one.text


def test_threads_share_one_model(loaded):
    """Nothing is left on the model, neither while it answers nor after; every thread gets the answer it gets alone."""
    model, processor = loaded
    asked = [(picture(60 + 40 * i, 90), f"Total {i}?", 2 + i) for i in range(4)]

    def ask(one):
        image, question, longest = one
        return answer(model, processor, image, question, max_new_tokens=longest).text

    alone, own = [ask(one) for one in asked], model.generation_config
    settings = own.to_dict()
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(ask, asked * 3)) == alone * 3
    assert model.generation_config is own
    assert own.to_dict() == settings
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_picture_that_was_read_is_not_read_again(loaded, tmp_path):
    path = tmp_path / "two.gif"
    picture(20, 20).save(path, save_all=True, append_images=[Image.new("RGB", (20, 20))])
    read = read_picture(path, name="mine")
    path.unlink()
    found = answer(*loaded, read, "Total?", max_new_tokens=1)
    assert (found.picture, found.image_size) == ("mine", (20, 20))
    assert found.warnings[0] == "mine: holds several frames, only the first is used"


def test_a_very_long_picture_is_answered_with_a_warning(loaded):
    found = answer(*loaded, picture(4, 4000), "Total?", max_new_tokens=2)
    assert not found.tiles_reach_llm
    assert "4000x4 pixels, so long that no tile reaches the language model" in found.warnings[0]


def test_warnings_about_picture_question_and_answer(loaded, tmp_path):
    path = tmp_path / "two.gif"
    picture(20, 20).save(path, save_all=True, append_images=[Image.new("RGB", (20, 20))])
    found = answer(*loaded, path, "Price in €?", max_new_tokens=1)
    frames, characters, length = found.warnings
    assert "only the first is used" in frames
    assert "'€'" in characters
    assert "cut off after 1 tokens" in length


@pytest.mark.parametrize(
    "question, message",
    [
        ("", "expected some text"),
        (" \n", "expected some text"),
        (None, "expected some text"),
        ("What is <image>?", "special token '<image>'"),
        ("<eos>", "special token '<eos>'"),
        ("\udcff?", "UTF-8"),
        ("a" * 1000, "fit the model's 1024 tokens"),
    ],
)
def test_questions_that_are_none(loaded, question, message):
    with pytest.raises(ValueError, match=message):
        answer(*loaded, picture(), question)


def test_numbers_of_new_tokens_out_of_range(loaded):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        answer(*loaded, picture(), "Total?", max_new_tokens=0)
    with pytest.raises(ValueError, match="fit the model's 1024 tokens"):
        answer(*loaded, picture(), "Total?", max_new_tokens=1000)


def test_pictures_that_are_none(loaded):
    with pytest.raises(ImageError, match="my file: expected a picture"):
        answer(*loaded, b"not a picture", "Total?", name="my file")


def test_numbers_that_are_none(copy):
    rewrite(copy, lambda tensors: tensors[TENSOR].fill_(float("nan")))
    with pytest.raises(ValueError, match="expected finite numbers"):
        answer(*load(copy), picture(), "Total?", max_new_tokens=1)


def test_without_fusion_there_is_no_backend(tmp_path):
    found = answer(*load(save_checkpoint(tmp_path, fusion="none")), picture(), "Total?", max_new_tokens=1)
    assert found.backend == {"choice": "none", "why": "the model has fusion off", "stages": []}

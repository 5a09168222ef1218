"""An answer carries its plan, backend and times, and depends on nothing but picture, question and model."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fila.checkpoints.check import GENERATION
from fila.geometry import Geometry
from fila.images import ImageError, read_picture
from fila.inference import answer, answer_batch, load
from tests.model.tiny_checkpoint import save_checkpoint


def picture(height: int = 200, width: int = 300) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


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


def test_numbers_that_are_none(checkpoint):
    model, processor = load(checkpoint)
    model.model.image_newline.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected finite numbers"):
        answer(model, processor, picture(), "Total?", max_new_tokens=1)


def test_without_fusion_there_is_no_backend(tmp_path):
    found = answer(*load(save_checkpoint(tmp_path, fusion="none")), picture(), "Total?", max_new_tokens=1)
    assert found.backend == {"choice": "none", "why": "the model has fusion off", "stages": []}

"""What an answer says about itself: how sure the model is, and whether the picture's text is large enough."""

import json
import math
from dataclasses import replace
from random import Random
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from fila import FilaConfig, preset
from fila.confidence import calibrated, log_probabilities
from fila.inference import CheckpointError, answer, answer_batch, load
from fila.legibility import MARGIN, capital_height
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import NANO_GEOMETRY, Sample
from recipes.nano.pages.sources import draw
from tests.model.tiny_checkpoint import save_checkpoint

GEOMETRY = replace(NANO_GEOMETRY, tile=96, canvases=[(y * 3 // 2, x * 3 // 2) for y, x in NANO_GEOMETRY.canvases])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def settings(folder, **more) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_the_probability_is_that_of_the_models_own_tokens(checkpoint) -> None:
    model, processor = load(checkpoint)
    pictures = [Image.new("RGB", (128, 128), "white"), Image.new("RGB", (60, 120), "grey")]
    alone = [answer(model, processor, p, "What?", max_new_tokens=5) for p in pictures]
    for one, picture in zip(alone, pictures, strict=True):
        said = processor.tokenizer.encode(one.text, add_special_tokens=False)
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        start = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        tokens = out.sequences[0, start:]
        assert len(said) <= len(tokens)
        logs = [step[0].log_softmax(-1)[token].item() for step, token in zip(out.logits, tokens, strict=True)]
        assert one.token_probability == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)
        assert one.confidence is None
    together = answer_batch(model, processor, pictures, ["What?"] * 2, max_new_tokens=5)
    for one, other in zip(alone, together, strict=True):
        assert one.token_probability == pytest.approx(other.token_probability, rel=1e-3)


def test_padding_behind_an_answer_that_has_ended_does_not_count() -> None:
    logits = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [9.0, -9.0]])]
    logs = log_probabilities(logits, torch.tensor([[0, 1], [1, 0]]))
    assert logs.tolist() == [
        pytest.approx([-math.log1p(math.exp(-2)), -math.log1p(math.exp(-1))]),
        pytest.approx([-math.log(2), 0.0], abs=1e-6),
    ]


def test_a_calibration_of_the_checkpoint_makes_it_a_probability(tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "calibrated")
    settings(folder, answer_calibration=[4.0, 1.5])
    model, processor = load(folder)
    found = answer(model, processor, Image.new("RGB", (128, 128), "white"), "What?", max_new_tokens=5)
    assert found.confidence == pytest.approx(1 / (1 + math.exp(-4.0 * math.log(found.token_probability) - 1.5)))
    assert calibrated(-1e9, (4.0, 1.5)) < 1e-200
    assert calibrated(-1.0, (4.0, 1.5)) < calibrated(-0.1, (4.0, 1.5)) < 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("answer_calibration", [1.0]),
        ("answer_calibration", "sure"),
        ("answer_calibration", {"slope": 1.0}),
        ("answer_calibration", [[1.0], 2.0]),
        ("smallest_capital", 0.0),
        ("smallest_capital", -5.0),
        ("smallest_capital", "small"),
    ],
)
def test_numbers_that_a_checkpoint_cannot_have_are_refused(tmp_path, name, value) -> None:
    folder = save_checkpoint(tmp_path / "wrong")
    settings(folder, **{name: value})
    with pytest.raises(CheckpointError, match=name):
        load(folder)


def test_both_settings_survive_saving(tmp_path) -> None:
    config = preset("fila-nano")
    assert (config.answer_calibration, config.smallest_capital) == (None, None)
    config.answer_calibration, config.smallest_capital = [3.5, 0.25], 5.0
    config.save_pretrained(tmp_path)
    found = FilaConfig.from_pretrained(tmp_path)
    assert (found.answer_calibration, found.smallest_capital) == ([3.5, 0.25], 5.0)


def page(seed: int) -> tuple[Sample, float]:
    """A document and the median height of its characters' capitals."""
    sample = draw(seed, {"documents": 1.0}, split="train", fonts=FontSet.builtin(), geometry=GEOMETRY)
    return sample, median(g.cap for g in sample.glyphs if g.char.isalnum())


def test_the_height_of_capitals_is_found_on_pages_of_every_size() -> None:
    for seed in range(12):
        sample, _ = page(seed)
        caps = [g.cap for g in sample.glyphs if g.char.isalnum()]
        height = capital_height(sample.image, GEOMETRY.layout(*sample.size))
        if height is not None:
            assert 0.85 * min(caps) < height < 1.35 * max(caps)


def test_small_text_is_warned_of_and_large_text_is_not() -> None:
    warned: dict[bool, list[bool]] = {True: [], False: []}
    for seed in range(20):
        sample, cap = page(seed)
        for times in (1, 3):
            wide = Image.new("RGB", (sample.image.width * times, sample.image.height * times))
            for i in range(times * times):
                wide.paste(sample.image, (i % times * sample.image.width, i // times * sample.image.height))
            height = capital_height(wide, GEOMETRY.layout(wide.height, wide.width))
            warned[cap / times < 4].append(height is not None and height < MARGIN * 5)
    assert not any(warned[False])
    assert sum(warned[True]) > 0.9 * len(warned[True]) > 10


def test_pictures_without_text_have_no_text_to_be_too_small() -> None:
    rng, random = np.random.default_rng(0), Random(0)
    shapes = Image.new("RGB", (500, 500), "white")
    pen = ImageDraw.Draw(shapes)
    for _ in range(40):
        x, y, side = random.randrange(450), random.randrange(450), random.randrange(5, 80)
        pen.rectangle((x, y, x + side, y + random.randrange(5, 80)), fill=(random.randrange(256), 0, 90))
    grid = Image.new("L", (400, 400), 255)
    for at in range(0, 400, 9):
        ImageDraw.Draw(grid).line((0, at, 400, at), fill=0)
        ImageDraw.Draw(grid).line((at, 0, at, 400), fill=0)
    noise = Image.fromarray(rng.integers(0, 256, (400, 500), dtype=np.uint8))
    blurred = noise.filter(ImageFilter.GaussianBlur(2)).point(lambda v: max(0, min(255, (v - 128) * 8 + 128)))
    for picture in (shapes, grid, noise, blurred, Image.new("L", (300, 300), 7), Image.new("RGB", (1, 9))):
        assert capital_height(picture, GEOMETRY.layout(picture.height, picture.width)) is None


def test_a_warning_names_what_the_model_sees_and_what_it_learned(tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "reads")
    sample, _ = page(3)
    for smallest, count in ((500.0, 1), (0.5, 0), (None, 0)):
        settings(folder, smallest_capital=smallest)
        model, processor = load(folder)
        found = answer(model, processor, sample.image, "Total?", max_new_tokens=32)
        assert sum("too small for this model" in warning for warning in found.warnings) == count

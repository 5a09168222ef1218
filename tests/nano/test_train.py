"""Training end to end at two steps per stage: targets, freezing, resuming, export and evaluation."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fila import preset
from fila.image_processing import FilaImageProcessor
from recipes.nano import checkpoint, depthwise, evaluate, train
from recipes.nano.data import (
    CLASSES,
    HELD,
    IGNORE,
    NUM_CLASSES,
    SLOTS,
    TRANSCRIBED,
    Page,
    Pages,
    character_map,
    collate,
    coverage_map,
    view_labels,
)
from recipes.nano.guidance import HEADS
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import SHAPES, Glyph, make_sample
from recipes.nano.stages import STAGES, Trainee, dense_loss
from recipes.nano.tokenizer import ASSISTANT, EOS, VOCABULARY, build_character_tokenizer

NAMES = {number: char for char, number in CLASSES.items()}


SHARES = {"cards": 0.4, "dense": 0.2, "documents": 0.4}


def nano_pages(render: bool = True) -> Pages:
    geometry = train.with_tile(preset("fila-nano"), 64).vision_config.geometry()
    return Pages(
        FilaImageProcessor.from_geometry(geometry),
        build_character_tokenizer(),
        geometry,
        FontSet.builtin(),
        split="train",
        seed=0,
        length=8,
        render=render,
        shares=SHARES,
    )


def test_maps_hold_every_character_on_its_line():
    for seed in range(20):
        sample = make_sample(seed, split="train", fonts=FontSet.builtin(), render=False)
        characters, coverage = character_map(sample, 8), coverage_map(sample)
        assert characters.shape == (sample.canvas[0] // 8, sample.canvas[1] // 8, SLOTS)
        held = Counter(NAMES[c] for c in characters[..., :HELD].flatten().tolist() if c)
        assert held == Counter(g.char for g in sample.glyphs)
        for glyph in sample.glyphs:
            patch = characters[int(glyph.line // 8), int(glyph.cx // 8), :HELD].tolist()
            assert CLASSES[glyph.char] in patch
            assert glyph.char == " " or coverage[int(glyph.cy // 4), int(glyph.cx // 4)] > 0
        text = "".join(NAMES[c] for row in characters for patch in row for c in patch[:HELD].tolist() if c)
        assert all(char in text for char in sample.answer)


def test_a_patch_knows_the_character_before_it_and_no_farther_than_two_patches():
    glyphs = [
        Glyph("g", 1.0, 5.0, 4.0, 7.0),
        Glyph(".", 5.0, 7.0, 4.0, 7.0),
        Glyph("b", 18.0, 4.0, 4.0, 7.0),
        Glyph("c", 50.0, 4.0, 4.0, 7.0),
    ]
    sample = replace(
        make_sample(0, split="train", fonts=FontSet.builtin(), render=False), glyphs=glyphs, canvas=(64, 64)
    )
    row = character_map(sample, 8)[0]
    assert [[NAMES.get(c, "") for c in patch] for patch in row[[0, 1, 2, 6]].tolist()] == [
        ["g", ".", "", ""], ["", "", "", ""], ["b", "", "", "."], ["c", "", "", ""]]  # fmt: skip


def test_view_labels_follow_the_tiles_and_leave_the_global_view_out():
    pages = nano_pages(render=False)
    page = next(pages[i] for i in range(8) if pages[i].layout.rows == pages[i].layout.columns == 2)
    labels = view_labels(page.characters, page.layout)
    grid = page.layout.geometry.grid
    assert labels.shape == (5, grid**2, SLOTS)
    assert (labels[0] == IGNORE).all()
    assert torch.equal(labels[4].view(grid, grid, SLOTS), page.characters[grid:, grid:])
    assert torch.equal(labels[2].view(grid, grid, SLOTS), page.characters[:grid, grid:])


def test_patches_without_characters_count_little_and_ignored_ones_nothing():
    logits = torch.randn(3, SLOTS * NUM_CLASSES)
    labels = torch.tensor([[3, 0, 0, 0], [0, 0, 0, 0], [IGNORE] * SLOTS])
    each = torch.nn.functional.cross_entropy(logits.view(-1, NUM_CLASSES)[:8], labels[:2].flatten(), reduction="none")
    expected = (each[:4].sum() + 0.1 * each[4:].sum()) / (4 + 0.1 * 4)
    torch.testing.assert_close(dense_loss(logits, labels), expected)


@pytest.mark.parametrize("transcribe", [False, True])
def test_a_conversation_asks_everything_and_learns_only_answers(transcribe):
    pages = nano_pages(render=False)
    sample = make_sample(0, split="train", fonts=pages.fonts, geometry=pages.geometry, render=False)
    page = pages.page(sample, transcribe)
    text = pages.tokenizer.decode(page.input_ids)
    learned = pages.tokenizer.decode(page.labels[page.labels >= 0])
    answers = [asked.answer for asked in sample.asked] + ["|".join(sample.lines)] * transcribe
    assert learned == "".join(answer + EOS for answer in answers)
    assert all(f"{asked.question}{ASSISTANT}{asked.answer}{EOS}" in text for asked in sample.asked)
    assert (page.input_ids == VOCABULARY["<image>"]).sum() == page.layout.num_tokens


def test_pages_of_every_canvas_and_kind_are_transcribed():
    pages = nano_pages(render=False)
    drawn = [pages[i] for i in range(0, 40 * TRANSCRIBED, TRANSCRIBED)]
    assert all("Read the page." in pages.tokenizer.decode(page.input_ids) for page in drawn)
    assert "Read the page." not in pages.tokenizer.decode(pages[1].input_ids)
    assert {page.layout.canvas for page in drawn} == set(pages.geometry.canvases)


def read_from(page: Page, packed: torch.Tensor, looks: int, seen: int) -> str:
    """The kind of place that `seen` is, and the character said after `looks` is there if it is a patch or a question.

    `packed` [n, S] holds the characters of the image's tokens in the model's own order.
    """
    assert page.labels[looks + 1] != IGNORE
    place = seen - page.input_ids.tolist().index(VOCABULARY["<image>"])
    if place >= len(packed):
        assert page.input_ids[seen] == page.input_ids[looks + 1]
        return "question"
    said = NAMES.get(CLASSES[build_character_tokenizer().decode([page.input_ids[looks + 1]])])
    there = [NAMES.get(int(c)) for c in packed[place, :HELD]]
    if said in there or None not in there:  # a patch names three characters and may hold more
        return "patch"
    return "shape" if set(there) & set(SHAPES.values()) else "label"


def test_heads_are_told_where_the_answers_characters_can_be_read():
    pages = nano_pages(render=False)
    model = train.build("fila-nano", tile=64)[0].model
    places = Counter()
    for i in range(24):
        page = pages[i]
        labels = view_labels(page.characters, page.layout).float()
        (packed,), _ = model.pack_image_features([labels], [list(page.size)], "default", torch.zeros(SLOTS))
        following, firsts = page.guides["read_next"].tolist(), page.guides["read_first"].tolist()
        assert {read_from(page, packed, *pair) for pair in following} <= {"patch"}
        for pair, kind in zip(firsts, page.kinds, strict=True):
            place = read_from(page, packed, *pair)
            assert (place == "question") == (kind == "line")
            named = ("above", "cell", "field", "item", "quantity", "date", "who", "when", "where")
            assert place in ("patch", "question") or kind in named
            places[place] += 1
    assert places["patch"] > places["shape"] > 0 < places["question"]


def test_guidance_rises_the_attention_it_asks_for():
    torch.manual_seed(0)
    trainee, _ = train.build("fila-nano", tile=64)
    pages = nano_pages(render=False)
    batch = collate([pages[0], pages[1]], 0)
    optimizer = torch.optim.Adam(trainee.model.language_model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        losses.append(sum(loss for name, loss in trainee("text", batch).items() if name in HEADS))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_fast_gradient_of_a_depthwise_convolution_is_the_librarys():
    torch.manual_seed(0)
    x, grad = torch.randn(2, 32, 9, 11), torch.randn(2, 32, 9, 11)
    expected = torch.nn.grad.conv2d_weight(x, (32, 1, 7, 7), grad, padding=3, groups=32)
    torch.testing.assert_close(depthwise.weight_gradient(x, grad), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vision", "text", "align", "tune"])
def test_a_stage_moves_what_it_trains_and_nothing_else(name):
    torch.manual_seed(0)
    trainee, geometry = train.build("fila-nano", STAGES[name].cropping, tile=64)
    assert isinstance(trainee, Trainee)
    trainee.freeze(STAGES[name])
    pages = nano_pages(render=name != "text")
    pages.geometry, pages.processor = geometry, FilaImageProcessor.from_geometry(geometry)
    for fusion in trainee.model.vision_tower.fusion:
        fusion.alpha.data.fill_(0.1)
    sum(trainee(name, collate([pages[0], pages[1]], 0)).values()).backward()
    moved = {n.split(".")[2] if "vision_tower" in n else n.split(".")[1] if n.startswith("model") else n.split(".")[0]
             for n, p in trainee.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip
    assert (
        moved
        == {
            "vision": {"vit", "convnext", "fusion", "heads", "multi_modal_projector"},
            "text": {"language_model", "image_newline", "grid_text"},
            "align": {"multi_modal_projector", "fusion", "heads"},
            "tune": {"vit", "convnext", "fusion", "heads", "multi_modal_projector", "language_model", "image_newline"},
        }[name]
    )


def stage(name: str, out, *more: str) -> None:
    options = [
        "--steps",
        "3",
        "--batch",
        "2",
        "--workers",
        "0",
        "--threads",
        "1",
        "--tile",
        "64",
        "--builtin-font",
        "--save-minutes",
        "0",
    ]
    assert train.main([name, "--out", str(out), *options, *more]) == 0


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    stage("text", tmp_path / "whole")
    add = train.Log.add

    def interrupted(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        add(self, step, *args)

    monkeypatch.setattr(train.Log, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage("text", tmp_path / "broken")
    monkeypatch.setattr(train.Log, "add", add)
    assert torch.load(tmp_path / "broken/text.pt", weights_only=True)["step"] == 2
    stage("text", tmp_path / "broken")
    whole, broken = (torch.load(tmp_path / name / "text.pt", weights_only=True) for name in ("whole", "broken"))
    assert broken["step"] == 3
    for name, value in whole["average"].items():
        assert torch.equal(value, broken["average"][name]), name


def test_all_stages_export_and_evaluation(tmp_path, monkeypatch, capsys):
    out, model = tmp_path / "run", tmp_path / "model"
    for name in STAGES:
        stage(name, out)
    assert checkpoint.main(["--run", str(out), "--out", str(model), "--tile", "64"]) == 1
    assert "error: expected a gate of at least" in capsys.readouterr().err
    assert not model.exists()
    monkeypatch.setattr(checkpoint, "LEAST_GATE", 0.0)
    assert checkpoint.main(["--run", str(out), "--out", str(model), "--tile", "64"]) == 0
    assert sum(f.stat().st_size for f in model.glob("*.safetensors")) < 16e6
    assert {log.stem for log in (model / "training").glob("*.csv")} == set(STAGES)
    weights = tmp_path / "stage0.safetensors"
    assert checkpoint.main(["--run", str(out), "--stage", "vision", "--weights", str(weights)]) == 0
    stage("tune", tmp_path / "again", "--init", str(weights))
    assert any(name.startswith("grid_text") for name in train.begin_with(train.build("fila-nano", tile=64)[0], model))
    report = tmp_path / "score.json"
    arguments = ["--model", str(model), "--count", "3", "--batch", "2", "--builtin-font", "--out", str(report)]
    assert evaluate.main(arguments) == 0
    assert json.loads(report.read_text())["all"]["count"] == 3
    assert len(report.with_suffix(".jsonl").read_text().splitlines()) == 3
    assert "intact:" in capsys.readouterr().out

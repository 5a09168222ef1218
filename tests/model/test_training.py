"""Training end to end at two steps a stage: targets, freezing, resuming, export and evaluation."""

import json

import pytest
import torch

from fila import preset
from fila.fragments.fonts import FontSet
from fila.fragments.pages import make_sample
from fila.image_processing import FilaImageProcessor
from fila.tokenization import ASSISTANT, EOS, VOCABULARY, build_character_tokenizer
from fila.training import evaluate, export, run
from fila.training.data import (
    CLASSES,
    IGNORE,
    SLOT_HEIGHT,
    SLOT_WIDTH,
    Pages,
    cells,
    character_map,
    collate,
    coverage_map,
    left_characters,
    view_labels,
)
from fila.training.stages import STAGES, Trainee

NAMES = {number: char for char, number in CLASSES.items()}


def nano_pages(render: bool = True) -> Pages:
    geometry = preset("fila-nano").vision_config.geometry()
    return Pages(
        FilaImageProcessor.from_geometry(geometry),
        build_character_tokenizer(),
        geometry,
        FontSet.builtin(),
        split="train",
        seed=0,
        length=8,
        render=render,
    )


def test_maps_hold_every_character_where_its_ink_is():
    placed = count = 0
    for seed in range(20):
        sample = make_sample(seed, split="train", fonts=FontSet.builtin(), render=False)
        slots, coverage = character_map(sample), coverage_map(sample)
        assert slots.shape == (sample.canvas[0] // 8, sample.canvas[1] // 4)
        assert (slots > 0).sum() <= len(sample.glyphs)
        for glyph in sample.glyphs:
            found = slots[int(glyph.cy // SLOT_HEIGHT), int(glyph.cx // SLOT_WIDTH)].item()
            placed, count = placed + (NAMES.get(found) == glyph.char), count + 1
            assert coverage[int(glyph.cy // 4), int(glyph.cx // 4)] > 0
    assert placed >= 0.97 * count  # two narrow characters can fall into one slot


def test_view_labels_follow_the_tiles_and_leave_the_global_view_out():
    pages = nano_pages(render=False)
    page = next(pages[i] for i in range(8) if pages[i].layout.rows == pages[i].layout.columns == 2)
    labels = view_labels(page.slots, page.layout)
    assert labels.shape == (5, 64, 3)
    assert (labels[0] == IGNORE).all()
    patches = cells(page.slots, 8)  # [16, 16, 2]
    assert torch.equal(labels[4, :, :2].view(8, 8, 2), patches[8:, 8:])
    assert torch.equal(labels[2, :, :2].view(8, 8, 2), patches[:8, 8:])


def test_the_character_to_the_left_is_seen_across_a_gap_of_three_slots_and_no_more():
    slots = torch.zeros(1, 12, dtype=torch.int64)
    slots[0, 1], slots[0, 2] = 5, 6
    assert left_characters(slots, 8)[0, :, 0].tolist() == [0, 5, 6, 0, 0, 0]


def test_a_conversation_asks_everything_and_learns_only_answers():
    pages = nano_pages(render=False)
    sample = make_sample(0, split="train", fonts=pages.fonts, geometry=pages.geometry, render=False)
    page = pages.page(sample)
    text = pages.tokenizer.decode(page.input_ids)
    learned = pages.tokenizer.decode(page.labels[page.labels >= 0])
    answers = [answer for _, answer in sample.questions] + ["|".join(sample.lines)]
    assert learned == "".join(answer + EOS for answer in answers)
    assert all(f"{question}{ASSISTANT}{answer}{EOS}" in text for question, answer in sample.questions)
    assert (page.input_ids == VOCABULARY["<image>"]).sum() == page.layout.num_tokens


@pytest.mark.parametrize("name", ["vision", "text", "align", "tune"])
def test_a_stage_moves_what_it_trains_and_nothing_else(name):
    torch.manual_seed(0)
    trainee, geometry = run.build("fila-nano", cropping=STAGES[name].cropping)
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
            "vision": {"vit", "convnext", "heads"},
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
        "--builtin-font",
        "--save-minutes",
        "0",
    ]
    assert run.main([name, "--out", str(out), *options, *more]) == 0


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    stage("text", tmp_path / "whole")
    add = run.Log.add

    def interrupted(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        add(self, step, *args)

    monkeypatch.setattr(run.Log, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage("text", tmp_path / "broken")
    monkeypatch.setattr(run.Log, "add", add)
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
    with pytest.raises(ValueError, match="expected a gate of at least"):
        export.main(["--run", str(out), "--out", str(model)])
    monkeypatch.setattr(export, "LEAST_GATE", 0.0)
    assert export.main(["--run", str(out), "--out", str(model)]) == 0
    assert sum(f.stat().st_size for f in model.glob("*.safetensors")) < 16e6
    assert {log.stem for log in (model / "training").glob("*.csv")} == set(STAGES)
    report = tmp_path / "score.json"
    arguments = ["--model", str(model), "--count", "3", "--batch", "2", "--builtin-font", "--out", str(report)]
    assert evaluate.main(arguments) == 0
    assert json.loads(report.read_text())["all"]["count"] == 3
    assert len(report.with_suffix(".jsonl").read_text().splitlines()) == 3
    assert "intact:" in capsys.readouterr().out

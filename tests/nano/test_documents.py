"""Documents, questions for what is not on a page, and the pages made by other means."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from recipes.nano import foreign
from recipes.nano.guidance import HEADS, guides
from recipes.nano.pages import absent, parts, words
from recipes.nano.pages.blocks import Block
from recipes.nano.pages.compose import draw_layout, make_style
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import CHARSET, NANO_GEOMETRY, SHAPES, Asked, Sample
from recipes.nano.pages.sheet import Sheet
from recipes.nano.pages.sources import draw
from recipes.nano.stages import STAGES

FONTS = FontSet.builtin()
GEOMETRY = replace(NANO_GEOMETRY, tile=96, canvases=[(y * 3 // 2, x * 3 // 2) for y, x in NANO_GEOMETRY.canvases])
DOCUMENTS = {"documents": 1.0}


def document(seed: int, **more) -> Sample:
    return draw(seed, DOCUMENTS, split="train", fonts=FONTS, geometry=GEOMETRY, render=False, **more)


def written(part, seed: int) -> list[Block]:
    """What a part writes onto an empty sheet."""
    rng = Random(seed)
    layout = draw_layout(rng, GEOMETRY)
    sheet = Sheet(rng, make_style(rng, "train", FONTS, layout), layout)
    part(sheet)
    return sheet.blocks


def test_documents_ask_of_every_kind_and_their_cells_have_two_names() -> None:
    kinds: Counter[str] = Counter()
    named = {"cell": {2}, "title": {0}, "addressee": {0}, "signer": {0}, "field": {1, 2}, "date": {1, 2}}
    for seed in range(160):
        sample = document(seed)
        height, width = sample.canvas
        assert all(0 <= g.cx < width and 0 <= g.line < height for g in sample.glyphs)
        for asked in sample.asked:
            kinds[asked.kind] += 1
            assert "".join(sample.glyphs[i].char for i in asked.glyphs) == asked.answer
            assert len(asked.anchors) in named.get(asked.kind, {1})
    assert set(kinds) >= {"field", "date", "item", "cell", "title", "line", "after", "above", "below", "quantity",
                          "who", "when", "where", "addressee", "signer"}  # fmt: skip
    assert kinds["field"] < 0.5 * sum(kinds.values())


def test_a_receipt_counts_its_things_and_sums_them_up() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(60):
        for block in written(parts.receipt, seed):
            for ask in block.asks:
                kinds[ask.kind] += 1
                answer = block.runs[ask.run].text[ask.start : ask.end]
                if ask.kind == "quantity":
                    assert answer.isdigit()
                else:
                    assert answer.replace(".", "").replace("$", "").isdigit()
                    assert block.runs[ask.anchor].text.startswith(ask.subject)
    assert all(kinds[kind] > 20 for kind in ("item", "field", "quantity"))


def test_a_tickets_values_stand_under_or_over_their_labels() -> None:
    seen = 0
    for seed in range(60):
        for block in written(parts.ticket, seed):
            for ask in block.asks:
                value, label = block.runs[ask.run], block.runs[ask.anchor]
                assert value.x == label.x
                assert abs(value.y - label.y) > label.em / 2
                seen += 1
    assert seen > 40


def test_a_label_of_two_lines_is_asked_for_as_one() -> None:
    seen = 0
    for seed in range(100):
        for block in written(parts.wrapped, seed):
            (ask,) = block.asks
            first, second, value = block.runs
            assert ask.subject == f"{first.text} {second.text}".rstrip(":- ")
            assert first.x == second.x < value.x
            assert value.y == pytest.approx(block.runs[ask.anchor].y, abs=0.01)
            seen += 1
    assert seen > 40


def test_a_sentence_is_asked_for_its_value_without_the_full_stop() -> None:
    for seed in range(60):
        for block in written(parts.sentence, seed):
            (ask,) = block.asks
            answer = block.runs[ask.run].text[ask.start : ask.end]
            assert not answer.endswith(".")
            assert block.runs[ask.run].text in (answer, answer + ".")


def test_a_letter_is_to_one_and_from_one() -> None:
    for seed in range(60):
        kinds = [asked.kind for asked in document(seed).asked]
        assert kinds.count("addressee") <= 1
        assert kinds.count("signer") <= 1


def test_what_is_absent_is_not_on_the_page_and_guides_nothing() -> None:
    asked_in_all = absent_in_all = first = 0
    for seed in range(100):
        plain, sample = document(seed), document(seed, absent=0.1)
        extra = [one for one in sample.asked if one.kind == absent.KIND]
        assert [one for one in sample.asked if one.kind != absent.KIND] == plain.asked
        assert (sample.question, sample.answer) == (plain.question, plain.answer)
        asked_in_all, absent_in_all = asked_in_all + len(sample.asked), absent_in_all + len(extra)
        first += sample.asked[0].kind == absent.KIND
        page = absent.page_words(sample.lines)
        for one in extra:
            assert one.answer == "not found"
            assert not one.glyphs
            assert not one.anchors
            named = {name for name in SHAPES if name in one.question.lower()}
            assert not named & absent.shown_shapes(sample)
            if " of " not in one.question:  # of a cell the heading may be there, the row is not
                labels = {w for w in absent.page_words([one.question]) if w in absent.HEADS}
                assert not labels & page
        layout = GEOMETRY.layout(*sample.size)
        alone = guides(replace(sample, asked=extra, links=[]), layout, 0, [5] * len(extra))
        assert all(len(alone[head]) == 0 for head in HEADS)
    assert 0.06 < absent_in_all / asked_in_all < 0.12
    assert first


def test_what_means_the_same_is_not_asked_as_absent() -> None:
    like = Asked("field", "", "", [], [])
    for seed in range(300):
        question = absent.ask_absent(Random(seed), "train", like, {"total", "tel", "tax"}, set())
        assert question is not None
        assert not absent.page_words([question]) & {"vat", "phone", "sum", "grand", "mobile", "date"}


def test_only_the_joint_stage_asks_for_what_is_absent() -> None:
    assert {name: stage.absent for name, stage in STAGES.items() if stage.absent} == {"tune": STAGES["tune"].absent}
    assert 0.05 <= STAGES["tune"].absent <= 0.1


def test_the_foreign_pages_are_those_that_were_fingerprinted(tmp_path, monkeypatch) -> None:
    asked = foreign.foreign_questions()
    pictures = {one.picture for one in asked}
    assert len(pictures) == 100
    assert len(foreign.LABELS) == len(set(foreign.LABELS)) == 30
    assert sum(path.stat().st_size for path in pictures) < 1_500_000
    assert Counter(one.picture.name.split("-")[0] for one in asked).keys() == {"html", "typst", "plot"}
    for one in asked:
        assert (one.answer == "not found") == (one.kind == "absent")
        assert set(one.answer) <= {*CHARSET, " "}
    (tmp_path / "labels.json").write_bytes(foreign.LIST.read_bytes() + b" ")
    monkeypatch.setattr(foreign, "LIST", tmp_path / "labels.json")
    with pytest.raises(ValueError, match="fingerprinted"):
        foreign.foreign_questions()


def test_no_label_of_the_foreign_pages_is_ever_trained() -> None:
    """Not as a label, nor as part of one, nor as a word: those of the test split are never drawn for training."""
    listed = {word.lower() for labels in words.LABELS.values() for label in labels for word in label.split()}
    listed |= {*parts.QUALIFIERS, *parts.PERSONS, *parts.PLACES, *parts.MOMENTS}
    for label in foreign.LABELS:
        assert label not in listed
        assert words.split_of(label) == "test"
    used = {w for page in json.loads(foreign.LIST.read_text()) for q in page["questions"]
            for w in absent.page_words([q["question"]])}  # fmt: skip
    assert used & set(foreign.LABELS) == set(foreign.LABELS)


def test_a_foreign_page_has_ink_on_one_of_the_canvases() -> None:
    for picture in {one.picture for one in foreign.foreign_questions()}:
        with Image.open(picture) as image:
            layout = GEOMETRY.layout(image.height, image.width)
            ink = image.convert("L")
        assert layout.canvas in GEOMETRY.canvases
        low, high = ink.getextrema()
        assert high - low > 150

"""The generator of pages: seeded, cut or intact as measured on the finished canvas, unreadable in the global view."""

import json
from collections import Counter
from dataclasses import replace
from random import Random
from statistics import median

import numpy as np
import pytest
from PIL import Image, ImageDraw

from recipes.nano.pages import blocks, compose, draw, seams, words
from recipes.nano.pages import sample as page_sample
from recipes.nano.pages.fonts import FONT_LIST, FontSet
from recipes.nano.pages.page import Page
from recipes.nano.pages.sample import CHARSET, NANO_GEOMETRY, SHAPES, make_sample
from recipes.nano.pages.sources import draw as draw_source
from recipes.nano.pages.turns import LONGEST_READ

FONTS = FontSet.builtin()
SPLITS = ("train", "test")


def clean_page(seed: int, cut: bool) -> Page:
    """A page drawn black on white without panels, shapes or wear: every dark pixel is a glyph's ink."""
    page = compose.find_page(
        Random(f"train/{seed}"), split="train", fonts=FONTS, geometry=NANO_GEOMETRY, cut=cut, measure=True
    )
    bare = [
        replace(
            block, runs=[r._replace(color=(0, 0, 0)) for r in block.runs], marks=[], fill=None, border=None, rule=None
        )
        for block in page.blocks
    ]
    return replace(page, blocks=bare, style=replace(page.style, paper=(255, 255, 255)), wear_seed=None)


def single_glyphs(page: Page) -> list[blocks.Run]:
    """The answer's characters as runs of their own, where they stand on the page."""
    block = page.blocks[0]
    run = block.runs[block.ask.run]
    found, x = [], run.x
    for i, char in enumerate(run.text):
        if char != " " and block.ask.start <= i < block.ask.end:
            found.append(run._replace(text=char, x=x))
        x += run.em * run.face[char].advance
    return found


def ink_alone(page: Page, run: blocks.Run) -> Image.Image:
    """The whole picture with nothing but one run, as ink: white on black."""
    image = draw.draw_page(replace(page, blocks=[replace(page.blocks[0], runs=[run])]))
    return image.convert("L").point(lambda v: 255 - v)


def on_canvas(page: Page, ink: Image.Image) -> np.ndarray:
    """The finished canvas of a picture of ink: fitted into the content rectangle, padding black."""
    content = page.layout.content
    canvas = Image.new("L", (page.layout.canvas[1], page.layout.canvas[0]))
    fitted = ink.resize((int(content.width), int(content.height)), Image.Resampling.BICUBIC)
    canvas.paste(fitted, (int(content.x0), int(content.y0)))
    return np.asarray(canvas, dtype=np.float64)


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_the_same_sample(split: str) -> None:
    for seed in (0, 7, 12345678901):
        first, again = (make_sample(seed, split=split, fonts=FONTS) for _ in range(2))
        assert first.image.tobytes() == again.image.tobytes()
        assert (first.question, first.answer, first.glyphs) == (again.question, again.answer, again.glyphs)
        assert first.image.mode == "RGB"
        assert NANO_GEOMETRY.layout(first.image.height, first.image.width).canvas == first.canvas


def test_seeds_and_splits_differ() -> None:
    samples = [make_sample(seed, split=split, fonts=FONTS, render=False) for seed in range(20) for split in SPLITS]
    assert len({(s.question, s.answer, tuple(s.glyphs)) for s in samples}) == len(samples)


def test_unrendered_samples_are_the_rendered_ones() -> None:
    """The measure on drawn glyphs rarely turns a page down, so that both ways see the same pages."""
    same = 0
    for seed in range(20):
        drawn, planned = (make_sample(seed, split="train", fonts=FONTS, render=r) for r in (True, False))
        assert planned.image is None
        same += (drawn.question, drawn.answer, drawn.glyphs) == (planned.question, planned.answer, planned.glyphs)
    assert same >= 18


@pytest.mark.parametrize("cut", [True, False])
def test_cut_and_intact_on_the_finished_canvas(cut: bool) -> None:
    """Measured anew: each glyph alone on the whole picture, the whole picture on the canvas, ink summed per side."""
    for seed in range(12):
        page = clean_page(seed, cut)
        tile = page.layout.geometry.tile
        worst = 0.0
        for run in single_glyphs(page):
            ink = on_canvas(page, ink_alone(page, run))
            for line in range(tile, ink.shape[0], tile):
                worst = max(worst, min(ink[:line].sum(), ink[line:].sum()) / ink.sum())
            for line in range(tile, ink.shape[1], tile):
                worst = max(worst, min(ink[:, :line].sum(), ink[:, line:].sum()) / ink.sum())
        assert (worst >= 0.2) if cut else (worst <= 0.01), (seed, page.question, page.answer, worst)


def test_answers_are_unreadable_in_the_global_view_and_readable_on_the_raster() -> None:
    tile = NANO_GEOMETRY.tile
    for seed in range(24):
        page = clean_page(seed, seed % 2 == 0)
        heights, widths = [], []
        for run in single_glyphs(page):
            left, top, right, bottom = ink_alone(page, run).point(lambda v: 255 * (v > 64)).getbbox()
            heights.append((bottom - top) * tile / page.layout.height)
            widths.append((right - left) * tile / page.layout.width)
            assert run.em * run.face.cap_height * page.layout.scale[0] >= 13
        assert median(heights) < 5 or median(widths) < 3, (seed, page.answer, heights, widths)
        stated = compose.global_ink(page)
        assert stated[0] < 5 or stated[1] < 3
        # The drawn ink grows by hinting and by antialiasing, at most a pixel of the picture on each side.
        assert stated[0] == pytest.approx(median(heights), abs=2.5 * tile / page.layout.height)
        assert stated[1] == pytest.approx(median(widths), abs=2.5 * tile / page.layout.width)


def test_glyph_centres_lie_on_the_drawn_ink() -> None:
    """A glyph's ink in the finished picture is what changes when that glyph is left out."""
    for seed in range(4):
        page = clean_page(seed, seed % 2 == 0)
        glyphs, places = page_sample.locate(page)
        sy, sx, oy, ox = draw.frame(page)
        full = np.asarray(draw.draw_page(page).convert("L"), dtype=int)
        block = page.blocks[0]
        answer = [i for i in places[0, block.ask.run][block.ask.start : block.ask.end] if glyphs[i].char != " "]
        singles = single_glyphs(page)
        others = [r for i, r in enumerate(block.runs) if i != block.ask.run]
        run = block.runs[block.ask.run]
        # The run without its answer, drawn as before.
        head, tail = run.text[: block.ask.start], run.text[block.ask.end :]
        assert tail == ""
        others.append(run._replace(text=head))
        assert len(answer) == len(singles) > 0
        for index, left_out in enumerate(singles):
            rest = others + singles[:index] + singles[index + 1 :]
            without = draw.draw_page(replace(page, blocks=[replace(block, runs=rest), *page.blocks[1:]]))
            changed = np.abs(full - np.asarray(without.convert("L"), dtype=int)) > 60
            ys, xs = np.nonzero(changed)
            glyph = glyphs[answer[index]]
            assert glyph.char == left_out.text
            assert glyph.cx == pytest.approx(ox + (xs.min() + xs.max() + 1) / 2 * sx, abs=0.75)
            assert glyph.cy == pytest.approx(oy + (ys.min() + ys.max() + 1) / 2 * sy, abs=0.75)


def test_shapes_are_glyphs_at_their_centre() -> None:
    seen = set()
    for seed in range(200):
        sample = make_sample(seed, split="train", fonts=FONTS, render=False)
        seen |= {g.char for g in sample.glyphs} & set(SHAPES.values())
    assert seen == set(SHAPES.values())
    page = clean_page(0, True)
    mark = blocks.Mark("star", 60.0, 40.0, 8.0, True, (0, 0, 0))
    page = replace(page, blocks=[blocks.Block([], 10, 10, marks=[mark])])
    ink = on_canvas(page, draw.draw_page(page).convert("L").point(lambda v: 255 - v)) > 128
    ys, xs = np.nonzero(ink)
    assert page_sample.locate(page)[0] == [page_sample.Glyph(SHAPES["star"], 60.0, 40.0, 40.0, 8.0)]
    assert xs.mean() == pytest.approx(59.5, abs=1)
    assert ys.mean() == pytest.approx(39.5, abs=1)


def test_characters_of_a_line_share_its_middle_and_gaps_between_runs_are_spaces() -> None:
    face = FONTS.families[0][0]
    run = blocks.Run("Total:", face, 10.0, 0.0, 20.0, (0, 0, 0))
    pen = blocks.advance(face, run.text, run.em)
    near, far = (run._replace(text="4 g", x=pen + gap) for gap in (3.0, 30.0))
    for value, spaces in ((near, 2), (far, 1)):
        page = replace(clean_page(0, True), blocks=[blocks.Block([run, value], 100, 20)])
        glyphs, _ = page_sample.locate(page)
        assert {g.line for g in glyphs} == {20.0 - 10.0 * face.cap_height / 2}
        assert "".join(g.char for g in sorted(glyphs, key=lambda g: g.cx)) == (
            "Total: 4 g" if spaces == 2 else "Total:4 g"
        )


def test_answers_fit_the_charset_and_stand_on_the_page() -> None:
    allowed = set(CHARSET)
    for seed in range(400):
        sample = make_sample(seed, split=SPLITS[seed % 2], fonts=FONTS, render=False)
        assert 0 < len(sample.answer) <= 12
        assert sample.answer == sample.answer.strip()
        assert set(sample.answer) <= allowed | {" "}
        assert {g.char for g in sample.glyphs} <= allowed | {" ", *SHAPES.values()}
        assert "".join(sample.glyphs[i].char for i in sample.answer_glyphs) == sample.answer.replace(" ", "")
        height, width = sample.canvas
        assert all(0 <= g.cx <= width and 0 <= g.cy <= height for g in sample.glyphs)


def test_every_kind_and_canvas_is_reached_and_half_is_cut() -> None:
    samples = [make_sample(seed, split="train", fonts=FONTS, render=False) for seed in range(800)]
    assert {s.kind for s in samples} == set(compose.KIND_SHARES)
    shares = Counter(s.canvas for s in samples)
    for canvas in NANO_GEOMETRY.canvases:
        wanted = compose.CANVAS_SHARES[canvas[0] // NANO_GEOMETRY.tile, canvas[1] // NANO_GEOMETRY.tile]
        assert shares[canvas] / len(samples) == pytest.approx(wanted, abs=0.05)
    assert sum(s.cut for s in samples) / len(samples) == pytest.approx(0.5, abs=0.06)
    for side in (True, False):
        forced = make_sample(3, split="train", fonts=FONTS, cut=side, render=False)
        assert forced.cut is side


def test_questions_name_one_place_only() -> None:
    """The label asked about stands once on the page; the lone word or number is the only one."""
    for seed in range(300):
        page = compose.find_page(
            Random(f"train/{seed}"), split="train", fonts=FONTS, geometry=NANO_GEOMETRY, cut=False, measure=False
        )
        ask = page.blocks[0].ask
        texts = [run.text for block in page.blocks for run in block.runs]
        if ask.kind in ("field", "date", "line", "after"):
            subject = ask.subject.removesuffix(" number").lower()
            named = [t for t in texts if t.lower().rstrip(":- ") == subject or t.lower().startswith(subject + " ")]
            assert len(named) == 1 or ask.kind in ("line", "after"), (page.question, texts)
        if ask.kind in ("above", "below"):
            assert Counter(m.shape for b in page.blocks for m in b.marks)[ask.subject] == 1
        if ask.kind in ("number", "shown_date"):
            assert sum(any(c.isdigit() for c in t) for t in texts) == 1
        if ask.kind == "word":
            assert sum(any(c.isalpha() for c in t) for t in texts) == 1


def test_further_questions_have_short_answers_from_the_page() -> None:
    for seed in range(60):
        sample = make_sample(seed, split="train", fonts=FONTS, render=False)
        text = "".join(g.char for g in sample.glyphs)
        assert (sample.asked[0].question, sample.asked[0].answer) == (sample.question, sample.answer)
        for asked in sample.asked:
            assert asked.question
            assert 0 < len(asked.answer) <= LONGEST_READ
            assert asked.answer == "".join(text[i] for i in asked.glyphs)


def test_a_crowded_page_asks_the_same_kind_of_question_among_more_lines() -> None:
    glyphs = [sum(len(make_sample(seed, split="train", fonts=FONTS, render=False, crowded=crowded).glyphs)
                  for seed in range(60)) for crowded in (False, True)]  # fmt: skip
    assert glyphs[1] > 1.2 * glyphs[0]


def test_words_of_the_test_are_never_trained_on() -> None:
    drawn = {split: {words.word(Random(i), split) for i in range(2000)} for split in SPLITS}
    assert not drawn["train"] & drawn["test"]
    assert all(words.split_of(w.upper()) == split for split in SPLITS for w in drawn[split])
    for seed in range(300):
        for split in SPLITS:
            sample = make_sample(seed, split=split, fonts=FONTS, render=False)
            if sample.kind in ("word", "title"):
                assert {words.split_of(w) for w in sample.answer.split()} == {split}


def test_one_square_view_has_nothing_to_cut() -> None:
    """Under the rule "direct" there are no tiles, hence no seams."""
    geometry = replace(NANO_GEOMETRY, rule="direct")
    for seed in range(6):
        sample = make_sample(seed, split="train", fonts=FONTS, geometry=geometry)
        assert sample.cut is False
        assert sample.canvas == (geometry.tile, geometry.tile)
        assert sample.image.height == sample.image.width


def test_a_card_seen_on_wider_canvases_keeps_its_picture_and_its_places() -> None:
    wide = replace(NANO_GEOMETRY, tile=128, canvases=[(2 * y, 2 * x) for y, x in NANO_GEOMETRY.canvases])
    for seed in range(6):
        card = make_sample(seed, split="train", fonts=FONTS)
        seen = draw_source(seed, {"cards": 1.0}, split="train", fonts=FONTS, geometry=wide)
        assert seen.image.tobytes() == card.image.tobytes()
        assert seen.canvas == (2 * card.canvas[0], 2 * card.canvas[1])
        for after, before in zip(seen.glyphs, card.glyphs, strict=True):
            assert (after.cx, after.cy) == pytest.approx((2 * before.cx, 2 * before.cy), abs=2)


def test_reading_lines_hold_the_whole_page() -> None:
    for seed in range(40):
        sample = make_sample(seed, split="train", fonts=FONTS, render=False)
        written = Counter(g.char for g in sample.glyphs if g.char not in (" ", *SHAPES.values()))
        assert Counter("".join(sample.lines).replace(" ", "")) == written


def test_share_of_ink_on_each_side() -> None:
    """A bar half across the seam, another beside it."""
    layout = NANO_GEOMETRY.layout(256, 512)
    ink = Image.new("L", (60, 40))
    ImageDraw.Draw(ink).rectangle((20, 10, 39, 29), fill=255)
    array, corner = seams.to_canvas(ink, (100, 256 - 30), layout)
    assert seams.shares(array, corner, layout) == [pytest.approx(0.5, abs=0.01)]
    array, corner = seams.to_canvas(ink, (100, 300), layout)
    assert seams.shares(array, corner, layout) == [0.0]
    assert [seams.verdict(s) for s in ([], [0.005], [0.1], [0.0, 0.3])] == ["intact", "intact", "between", "cut"]


def test_font_list() -> None:
    listed = json.loads(FONT_LIST.read_text())["families"]
    names = [f["family"] for f in listed]
    assert len(set(names)) == len(names)
    for split, least in (("train", 24), ("test", 8)):
        chosen = [f for f in listed if f["split"] == split]
        assert len(chosen) >= least
        assert {f["kind"] for f in chosen} == {"sans", "serif", "mono"}
    assert {f["split"] for f in listed} == set(SPLITS)
    for family in listed:
        assert family["package"].startswith("fonts-")
        assert family["version"]
        assert family["licence"]
        assert family["files"][0]["style"] == "regular"
        for entry in family["files"]:
            assert len(bytes.fromhex(entry["sha256"])) == 32
            assert entry["path"].endswith(entry["file"])


def test_fonts_that_are_missing_or_differ(tmp_path) -> None:
    face = tmp_path / "a.ttf"
    entry = {"file": "a.ttf", "path": str(face), "style": "regular", "sha256": "00" * 32}
    family = {"family": "A", "split": "test", "package": "fonts-a", "files": [entry]}
    listed = tmp_path / "fonts.json"
    listed.write_text(json.dumps({"families": [family]}))
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-a"):
        FontSet.installed("test", font_list=listed)
    face.write_bytes(b"not the listed file")
    with pytest.raises(ValueError, match="differs"):
        FontSet.installed("test", verify=True, font_list=listed)
    with pytest.raises(ValueError, match="split"):
        FontSet.installed("dev", font_list=listed)


def test_the_command_writes_pictures_and_labels(tmp_path) -> None:
    assert page_sample.main(["--out", str(tmp_path), "--count", "2", "--seed", "5", "--builtin-font"]) == 0
    records = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in records] == [5, 6]
    for record in records:
        sample = make_sample(record["seed"], split="test", fonts=FONTS)
        assert (record["question"], record["answer"]) == (sample.question, sample.answer)
        with Image.open(tmp_path / record["file"]) as image:
            assert image.tobytes() == sample.image.tobytes()

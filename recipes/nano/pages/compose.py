"""Plans a page: canvas and colours, the block with the answer where a seam cuts it or not, and what stands around it.

The block that holds the answer is placed first, so that a seam runs through one of its glyphs, or through none of them.
"""

import math
from random import Random
from statistics import median

from fila.geometry import Geometry, Layout
from recipes.nano.pages import blocks as make
from recipes.nano.pages import draw, seams
from recipes.nano.pages.blocks import LONGEST_ANSWER, SHAPES, Block, Color, Run, Style
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.page import Page
from recipes.nano.pages.questions import phrase

CANVAS_SHARES = {(1, 2): 0.2, (2, 1): 0.2, (2, 2): 0.3, (1, 3): 0.15, (3, 1): 0.15}  # (rows, columns) of tiles
KIND_SHARES = {
    "field": 32, "date": 10, "above": 13, "below": 13, "number": 8, "word": 7, "shown_date": 4, "title": 4, "line": 4,
    "after": 5,
}  # fmt: skip
_KINDS, _KIND_WEIGHTS = tuple(KIND_SHARES), tuple(KIND_SHARES.values())
_ATTEMPTS, _PATIENCE = 400, 40


def find_page(
    rng: Random, *, split: str, fonts: FontSet, geometry: Geometry, cut: bool, measure: bool, crowded: bool = False
) -> Page:
    """Plans pages until one fits and, with `measure`, until the drawn answer is cut or intact as wanted."""
    for attempt in range(_ATTEMPTS):
        if attempt % _PATIENCE == 0:  # kept for a while, or the kinds and canvases that fit easily would crowd the rest
            layout, kind = draw_layout(rng, geometry), rng.choices(_KINDS, _KIND_WEIGHTS)[0]
        page = plan_page(rng, split=split, fonts=fonts, layout=layout, kind=kind, cut=cut, crowded=crowded)
        if page is not None and (not measure or measured(page) == ("cut" if cut else "intact")):
            return page
    raise RuntimeError(f"no page found for split {split}, cut {cut} in {_ATTEMPTS} attempts: is a tile too small?")


def plan_page(
    rng: Random, *, split: str, fonts: FontSet, layout: Layout, kind: str, cut: bool, crowded: bool = False
) -> Page | None:
    """One attempt at a page, or None where the block with the answer does not fit."""
    style = make_style(rng, split, fonts, layout)
    target = _target(rng, style, kind, layout)
    if target is None or target.width > style.width or not 0 < len(target.answer) <= LONGEST_ANSWER:
        return None
    assert target.ask is not None
    _decorate(rng, style, target, bordered=0.05)
    if not _place_target(rng, target, layout, cut):
        return None
    question = phrase(rng, target.ask.kind, target.ask.subject)
    placed = [target]
    _fill(rng, style, placed, layout, kind, crowded)
    return Page(layout, style, placed, target.ask.kind, question, cut, rng.getrandbits(32))


def measured(page: Page) -> str:
    """The seams' effect on the answer, drawn glyph by glyph and resized to the canvas: see `seams.verdict`."""
    block = page.blocks[0]
    assert block.ask is not None
    run = block.runs[block.ask.run]
    horizontal, vertical = seams.seams(page.layout)
    found = []
    boxes = ink_boxes(block, run)
    for i in range(block.ask.start, block.ask.end):
        box = boxes[i]
        if box is None:
            continue
        x0, y0, x1, y1 = box
        # Farther than the resize's kernel reaches, a seam can have no part of the glyph.
        if any(x0 - 4 < s < x1 + 4 for s in vertical) or any(y0 - 4 < s < y1 + 4 for s in horizontal):
            patch, origin = draw.draw_glyph(page, block, run, i)
            found += seams.shares(*seams.to_canvas(patch, origin, page.layout), page.layout)
    return seams.verdict(found)


def ink_boxes(block: Block, run: Run) -> list[tuple[float, float, float, float] | None]:
    """(x0, y0, x1, y1) of every glyph's ink, canvas pixels; None for spaces."""
    found: list[tuple[float, float, float, float] | None] = []
    x, y, em, face = run.x + block.x, run.y + block.y, run.em, run.face
    for char in run.text:
        m = face[char]
        if char == " ":
            found.append(None)
        else:
            found.append((x + em * m.x0, y + em * m.y0, x + em * m.x1, y + em * m.y1))
        x += em * m.advance
    return found


def global_ink(page: Page) -> tuple[float, float]:
    """Median (height, width) of the ink of the answer's glyphs in the global view, pixels of that view."""
    block = page.blocks[0]
    assert block.ask is not None
    boxes = ink_boxes(block, block.runs[block.ask.run])[block.ask.start : block.ask.end]
    height = median(box[3] - box[1] for box in boxes if box is not None)
    width = median(box[2] - box[0] for box in boxes if box is not None)
    tile, content = page.layout.geometry.tile, page.layout.content
    return height * tile / content.height, width * tile / content.width


def draw_layout(rng: Random, geometry: Geometry, shares: dict[tuple[int, int], float] = CANVAS_SHARES) -> Layout:
    """A picture size, 1.5 to 3 image pixels to a canvas pixel, whose best canvas is the one drawn.

    Under the rule "direct" there is one view, the picture stretched to a tile: a square picture, which has no seams.
    """
    tile = geometry.tile
    if geometry.rule == "direct":
        side = round(tile * rng.uniform(1.5, 3.0))
        return geometry.layout(side, side)
    canvases = [c for c in geometry.canvases if (c[0] // tile, c[1] // tile) in shares]
    canvas = rng.choices(canvases, [shares[c[0] // tile, c[1] // tile] for c in canvases])[0]
    rows, columns = canvas[0] // tile, canvas[1] // tile
    while True:
        # The rule of choice gives one row of two tiles only to pictures of exactly 1:2; longer ones get three tiles.
        if rows == columns:
            aspect = math.exp(rng.uniform(-0.5, 0.5)) if rng.random() < 0.7 else 1.0
        else:
            long = rng.uniform(2.15, 3.6) if max(rows, columns) == 3 else 2.0
            aspect = long if columns > rows else 1 / long
        height, width = (canvas[1] / aspect, canvas[1]) if aspect > columns / rows else (canvas[0], canvas[0] * aspect)
        scale = rng.uniform(1.5, 3.0 if height * width < 50_000 else 2.5)
        if max(rows, columns) == 2 and rows != columns:
            short = round(min(height, width) * scale)
            size = (short, 2 * short) if columns > rows else (2 * short, short)
        else:
            size = round(height * scale), round(width * scale)
        layout = geometry.layout(*size)
        if layout.canvas == canvas:
            return layout


def _color(rng: Random, span: tuple[int, int], strong: int = -1, strong_span: tuple[int, int] = (0, 0)) -> Color:
    """A random colour: every channel from `span`, the channel `strong` from its own."""
    red, green, blue = (rng.randint(*(strong_span if channel == strong else span)) for channel in range(3))
    return red, green, blue


def make_style(rng: Random, split: str, fonts: FontSet, layout: Layout) -> Style:
    """A font family and colours of reasonable contrast."""
    dark = rng.random() < 0.12
    if dark:
        paper, ink = _color(rng, (5, 60)), _color(rng, (205, 255))
        accents = [_color(rng, (130, 255), k, (255, 255)) for k in range(3)]
    else:
        base, level = rng.randint(225, 255), rng.randint(0, 70)
        paper = (base, base, base) if rng.random() < 0.5 else _color(rng, (218, 255))
        ink = (level, level, level)
        accents = [_color(rng, (0, 60), k, (90, 170)) for k in range(3)]
    content = layout.content
    shapes = list(SHAPES)
    rng.shuffle(shapes)
    tile = layout.geometry.tile
    # Where there are tiles, the global view should not show the answer; under the rule "direct" it is all there is.
    shrink = (tile / content.height, tile / content.width) if layout.rows else (1e-3, 1e-3)
    return Style(
        split, rng.choice(fonts.families), ink, accents, paper, dark, content.height / layout.height,
        shrink, content.width - 8, shapes,
    )  # fmt: skip


def _target(rng: Random, style: Style, kind: str, layout: Layout) -> Block | None:
    room = int(layout.content.height // 16)
    if kind in ("field", "date"):
        return make.fields(rng, style, True, room, "date" if kind == "date" else None)
    if kind in ("above", "below"):
        return make.shape(rng, style, True, kind)
    if kind in ("number", "word", "shown_date"):
        return make.lone(rng, style, True, kind)
    if kind == "title":
        return make.title(rng, style, True)
    return make.prefixed(rng, style, True, kind == "line")


def _decorate(rng: Random, style: Style, block: Block, bordered: float) -> None:
    """A border for a share of the blocks; sometimes a tinted or inverted panel."""
    r = rng.random()
    if r < bordered:
        block.border = style.ink
    elif r < 0.88 or style.dark:
        return
    elif r < 0.96:
        block.fill = tuple(max(0, c - rng.randint(8, 40)) for c in style.paper)  # type: ignore[assignment]
    else:
        block.fill = style.ink
        paper: Color = style.paper
        block.runs = [run._replace(color=paper) for run in block.runs]
        block.marks = [mark._replace(color=paper) for mark in block.marks]


def _place_target(rng: Random, block: Block, layout: Layout, cut: bool) -> bool:
    """Moves the block to where a seam cuts a glyph of its answer, or none; False where no such place was found."""
    assert block.ask is not None
    content = layout.content
    x_low, x_high = content.x0 + 4, content.x1 - 4 - block.width
    y_low, y_high = content.y0 + 1, content.y1 - 1 - block.height
    if x_high < x_low or y_high < y_low:
        return False
    horizontal, vertical = seams.seams(layout)
    run = block.runs[block.ask.run]
    block.x = block.y = 0.0
    boxes = [
        (box, run.face[run.text[i]], run.text[i])
        for i, box in enumerate(ink_boxes(block, run))
        if box is not None and block.ask.start <= i < block.ask.end
    ]
    for _ in range(12):
        block.x, block.y = rng.uniform(x_low, x_high), rng.uniform(y_low, y_high)
        if not cut:
            if not any(
                x0 + block.x - 1.5 < s < x1 + block.x + 1.5 for (x0, _, x1, _), _, _ in boxes for s in vertical
            ) and not any(
                y0 + block.y - 1.5 < s < y1 + block.y + 1.5 for (_, y0, _, y1), _, _ in boxes for s in horizontal
            ):
                return True
            continue
        choice = rng.randrange(len(vertical) + len(horizontal))
        box, metrics, char = rng.choice(boxes)
        if not char.isalnum():
            continue
        share = rng.uniform(0.3, 0.7)
        if choice < len(vertical):
            if box[2] - box[0] < 2.0:  # a stroke this thin has no two sides left after the resize
                continue
            block.x = vertical[choice] - (box[0] + (box[2] - box[0]) * _quantile(metrics.share_x, share))
            if x_low <= block.x <= x_high:
                return True
        else:
            seam = horizontal[choice - len(vertical)]
            block.y = seam - (box[1] + (box[3] - box[1]) * _quantile(metrics.share_y, share))
            if y_low <= block.y <= y_high:
                return True
    return False


def _quantile(cumulative: tuple[float, ...], share: float) -> float:
    """The place along a glyph (0 to 1) at which a share of its ink is passed."""
    for i in range(1, len(cumulative)):
        if cumulative[i] >= share:
            low, high = cumulative[i - 1], cumulative[i]
            return (i - 1 + (share - low) / (high - low)) / (len(cumulative) - 1)
    return 1.0


def _fill(rng: Random, style: Style, placed: list[Block], layout: Layout, kind: str, crowded: bool) -> None:
    """Other blocks around the target, none of which makes the question ambiguous."""
    content = layout.content
    top = content.y0 + 1
    if kind == "title":
        top = placed[0].y + placed[0].height
    elif rng.random() < 0.3 and kind not in ("word", "number", "shown_date"):
        block = make.title(rng, style, False)
        if block is not None and content.y0 + 2 + block.height < placed[0].y and block.width < style.width:
            block.x = content.x0 + 4 + rng.random() * (style.width - block.width)
            block.y = content.y0 + rng.uniform(1, max(1.0, min(12.0, placed[0].y - block.height - content.y0)))
            if _free(block, placed):
                placed.append(block)
                top = block.y + block.height
    tiles = (layout.canvas[0] // layout.geometry.tile) * (layout.canvas[1] // layout.geometry.tile)
    for _ in range(rng.randint(1, 4 + 2 * tiles)):
        block = _other(rng, style, kind, layout)
        if block is None or block.width > style.width or block.height > content.y1 - 1 - top:
            continue
        _decorate(rng, style, block, bordered=0.5)
        for _ in range(4):
            block.x = content.x0 + 4 + rng.random() * (style.width - block.width)
            block.y = rng.uniform(top, content.y1 - 1 - block.height)
            if _free(block, placed):
                placed.append(block)
                break
    y = top
    while crowded and y < content.y1 - make.LINE_PITCH - 1:
        block = _other(rng, style, kind, layout, low=True)
        if block is not None and block.width < style.width and block.height < content.y1 - 1 - y:
            block.x, block.y = content.x0 + 4 + rng.random() * (style.width - block.width), y
            if _free(block, placed):
                placed.append(block)
                y += block.height
        y += rng.uniform(1.0, 3.0)


def _other(rng: Random, style: Style, kind: str, layout: Layout, low: bool = False) -> Block | None:
    room = 1 if low else int(layout.content.height // 20)
    r = rng.random()
    if kind == "word":  # the page's only word: numbers and bare shapes around it
        if r < 0.6:
            return make.lone(rng, style, False, "number")
        return make.prose(rng, style, room, digits=True, letters=False)
    if kind in ("number", "shown_date"):  # the page's only digits
        return make.prose(rng, style, room, digits=False)
    if r < 0.35:
        return make.fields(rng, style, False, room, None)
    if r < 0.55:
        return make.prose(rng, style, room)
    if r < 0.75:
        return make.shape(rng, style, False)
    if r < 0.87:
        return make.prefixed(rng, style, False, False)
    return make.lone(rng, style, False, rng.choice(("number", "word")))


def _free(block: Block, placed: list[Block]) -> bool:
    """Whether the block keeps clear of all others: panels stand 3 pixels out at the sides."""
    x0, x1, y0, y1 = block.x - 8, block.x + block.width + 8, block.y - 1.5, block.y + block.height + 1.5
    return all(b.x >= x1 or b.x + b.width <= x0 or b.y >= y1 or b.y + b.height <= y0 for b in placed)

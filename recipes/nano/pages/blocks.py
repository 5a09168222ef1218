"""Blocks of a page: labelled lines, shapes between words, titles, lone numbers, plain text.

A block is laid out in canvas pixels relative to its own upper left corner and later moved as one piece; text is a
list of runs whose glyphs are placed one by one from the face's metrics. Each block can carry one `Ask`: what of it
may be asked.
"""

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from recipes.nano.pages import words
from recipes.nano.pages.fonts import Face

Color = tuple[int, int, int]
SHAPES = {"circle": "\u25cb", "square": "\u25a1", "triangle": "\u25b3", "star": "\u2606"}
LINE_PITCH = 14.0  # least distance of two lines, canvas pixels: a patch of 16 seldom holds two
LEAST_CAP = 6.5  # least height of a capital, canvas pixels: 13 on the high-resolution raster
LONGEST_ANSWER = 12


class Run(NamedTuple):
    """A piece of text: `x` of its first pen position, `y` of its baseline and its font size `em`, canvas pixels."""

    text: str
    face: Face
    em: float
    x: float
    y: float
    color: Color


class Mark(NamedTuple):
    """A drawn shape, centre and radius in canvas pixels."""

    shape: str
    cx: float
    cy: float
    r: float
    filled: bool
    color: Color


class Stroke(NamedTuple):
    """A drawn line, relative to its block, canvas pixels."""

    x0: float
    y0: float
    x1: float
    y1: float
    dashed: bool = False


class Ask(NamedTuple):
    """A question a block can answer: `runs[run].text[start:end]` is the answer.

    `anchor` is the run that names the place (-1: the block's shape); `above` another one, as a column's heading.
    """

    kind: str
    subject: str
    run: int
    start: int
    end: int
    anchor: int | None = None
    above: int | None = None


@dataclass
class Block:
    """Runs and marks with their extent; `fill` and `border` colour a panel behind them, `rule` a line below.

    `asks` lists everything that can be asked; where it is empty, it follows from the runs (`turns.asks`).
    """

    runs: list[Run]
    width: float
    height: float
    ask: Ask | None = None
    marks: list[Mark] = field(default_factory=list)
    fill: Color | None = None
    border: Color | None = None
    rule: Color | None = None
    asks: list[Ask] = field(default_factory=list)
    strokes: list[Stroke] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0

    @property
    def answer(self) -> str:
        assert self.ask is not None
        return self.runs[self.ask.run].text[self.ask.start : self.ask.end]


@dataclass
class Style:
    """Choices one page keeps to, and what is already on it.

    Args:
        faces: the faces of the page's family.
        ink, accents: text colours. `paper`: background.
        canvas_per_pixel: canvas pixels of one image pixel; font sizes fall on half image pixels.
        shrink: global-view pixels per canvas pixel, along y and x.
        width: room for a block, canvas pixels.
        shapes: shapes still to be drawn; `used`: words and labels already on the page, lower case.
    """

    split: str
    faces: list[Face]
    ink: Color
    accents: list[Color]
    paper: Color
    dark: bool
    canvas_per_pixel: float
    shrink: tuple[float, float]
    width: float
    shapes: list[str]
    used: set[str] = field(default_factory=set)

    def word(self, rng: Random, longest: int = LONGEST_ANSWER) -> str:
        """A word not yet on this page, in some case."""
        while True:
            found = words.word(rng, self.split, longest)
            if found not in self.used:
                self.used.add(found)
                return words.cased(rng, found)

    def labels(self, rng: Random, count: int) -> list[tuple[str, str]]:
        """(label, value type) pairs whose labels are not yet on this page."""
        found = [pair for pair in words.labels(rng, self.split, count) if pair[0].lower() not in self.used]
        self.used.update(label.lower() for label, _ in found)
        return found

    def face(self, rng: Random, bold: float = 0.15) -> Face:
        return rng.choice(self.faces) if rng.random() < bold else self.faces[0]

    def color(self, rng: Random) -> Color:
        return rng.choice(self.accents) if rng.random() < 0.2 else self.ink

    def em(self, rng: Random, face: Face, answer: str | None, largest_cap: float = 10.0) -> float | None:
        """A font size in canvas pixels, or None where no readable size keeps `answer` unreadable in the global view.

        `answer` None: no upper bound but `largest_cap`.
        """
        least, most = LEAST_CAP / face.cap_height, largest_cap / face.cap_height
        if answer is not None:
            most = min(most, 0.92 * largest_unreadable_em(face, answer, self.shrink))
        step = self.canvas_per_pixel / 2
        em = int(rng.uniform(min(least + step, most), most) / step) * step
        return em if em >= least else None


UNREADABLE_HEIGHT = 5.0
UNREADABLE_WIDTH = 3.0


def largest_unreadable_em(face: Face, text: str, shrink: tuple[float, float]) -> float:
    """The em (canvas pixels) below which `text` counts as unreadable in the global view.

    Unreadable: median ink height under 5 or median ink width under 3 pixels of the global view, the cells of the
    smallest legible raster fonts (3 x 5). `shrink` is global-view pixels per canvas pixel along y and x.
    """
    boxes = [face[c] for c in text if c != " "]
    heights, widths = sorted(m.y1 - m.y0 for m in boxes), sorted(m.x1 - m.x0 for m in boxes)
    middle = len(boxes) // 2
    return max(UNREADABLE_HEIGHT / (heights[middle] * shrink[0]), UNREADABLE_WIDTH / (widths[middle] * shrink[1]))


def advance(face: Face, text: str, em: float) -> float:
    """Width of a text in canvas pixels."""
    return em * sum(face[c].advance for c in text)


def pitch(rng: Random, em: float) -> float:
    return max(LINE_PITCH, em * rng.uniform(1.15, 1.5))


def baseline(face: Face, em: float, height: float) -> float:
    """Baseline, from the top of a line of that height, that centres capitals."""
    return (height + em * face.cap_height) / 2


def fields(rng: Random, style: Style, target: bool, room: int, kind: str | None = None) -> Block | None:
    """Labelled lines, "Total: 42.10": on one line, in columns, or the label above its value."""
    labels = style.labels(rng, rng.randint(1, max(1, min(4, room))))
    if not labels:
        return None
    pick = rng.randrange(len(labels))
    if kind == "date":
        label = rng.choice(words.LABELS["date"])
        if label.lower() in style.used:
            return None
        style.used.add(label.lower())
        labels[pick] = (label, "date")
    values = [words.value(rng, style.split, kind_) for _, kind_ in labels]
    case = rng.random()
    shown = [label.upper() if case < 0.15 else label.lower() if case < 0.22 else label for label, _ in labels]
    label_face, value_face = style.face(rng, 0.3), style.face(rng, 0.3)
    em = style.em(rng, value_face, values[pick] if target else None)
    if em is None:
        return None
    mark = rng.choice((":", ":", ":", "", " -")) if len(labels) > 1 or not target else ":"
    texts = [label + mark for label in shown]
    label_color, value_color = style.color(rng), style.color(rng)
    step, gap = pitch(rng, em), em * 0.3
    widths = [advance(label_face, t, em) for t in texts]
    value_widths = [advance(value_face, v, em) for v in values]
    arrangement = rng.random()
    runs, y = [], 0.0
    column = max(widths) + em * rng.uniform(0.6, 1.6)
    right = column + max(value_widths)
    stacked = arrangement > 0.88 and len(labels) <= max(1, room // 2)
    for text, value, w, v in zip(texts, values, widths, value_widths, strict=True):
        runs.append(Run(text, label_face, em, 0.0, y + baseline(label_face, em, step), label_color))
        if stacked:
            y += step
        x = 0.0 if stacked else w + gap if arrangement < 0.5 else column if arrangement < 0.75 else right - v
        runs.append(Run(value, value_face, em, x, y + baseline(value_face, em, step), value_color))
        y += step
    width = max(
        r.x + w for r, w in zip(runs, [w for pair in zip(widths, value_widths, strict=True) for w in pair], strict=True)
    )
    asked, subject = "date" if labels[pick][1] == "date" else "field", shown[pick]
    if labels[pick][0] in words.NUMBERED and values[pick].isdigit() and rng.random() < 0.4:
        subject += " number"
    return Block(runs, width, y, Ask(asked, subject, 2 * pick + 1, 0, len(values[pick])))


def prefixed(rng: Random, style: Style, target: bool, whole: bool) -> Block | None:
    """A line "Gate B12": asked for as a whole (`whole`) or for what comes after the first word."""
    labels = style.labels(rng, 1)
    if not labels:
        return None
    label, kind = labels[0]
    value = words.value(rng, style.split, kind if rng.random() < 0.6 else "code")
    label = label.upper() if rng.random() < 0.2 else label
    mark = ":" if whole and rng.random() < 0.4 else ""
    text = f"{label}{mark} {value}"
    if whole and len(text) > LONGEST_ANSWER:
        return None
    start = 0 if whole else len(label) + 1
    face = style.face(rng)
    em = style.em(rng, face, text[start:] if target else None)
    if em is None:
        return None
    step = pitch(rng, em)
    run = Run(text, face, em, 0.0, baseline(face, em, step), style.color(rng))
    ask = Ask("line" if whole else "after", label, 0, start, len(text))
    return Block([run], advance(face, text, em), step, ask)


def shape(
    rng: Random,
    style: Style,
    target: bool,
    side: str = "above",
    em: float | None = None,
    color: Color | None = None,
) -> Block | None:
    """A shape with a word, number or code above and below it; `side` is what may be asked."""
    if not style.shapes:
        return None
    name = style.shapes.pop()
    sides = ("above", "below")
    texts = []
    for _ in sides:
        r = rng.random()
        texts.append(style.word(rng, 9) if r < 0.6 else words.number(rng) if r < 0.8 else words.code(rng))
    if texts[0] == texts[1]:
        return None
    asked = sides.index(side)
    face = style.face(rng)
    em = em or style.em(rng, face, texts[asked] if target else None)
    if em is None:
        return None
    step, r = pitch(rng, em), rng.uniform(4.5, 9.0)
    widths = [advance(face, t, em) for t in texts]
    color = color or style.color(rng)
    half = max(r + rng.uniform(1.5, 3.0) + step / 2, LINE_PITCH)
    cx, cy = max(r + 1, *(w / 2 for w in widths)), half + step / 2
    runs = []
    for text, w, away in zip(texts, widths, (-half, half), strict=True):
        runs.append(Run(text, face, em, cx - w / 2, cy + away + em * face.cap_height / 2, color))
    mark = Mark(name, cx, cy, r, rng.random() < 0.4, style.color(rng))
    return Block(runs, 2 * cx, 2 * cy, Ask(side, name, asked, 0, len(texts[asked])), [mark])


def lone(rng: Random, style: Style, target: bool, kind: str) -> Block | None:
    """One number, word or date by itself."""
    if kind == "word":
        text = style.word(rng)
    elif kind == "shown_date":
        text = words.date(rng)
    else:
        text = rng.choice((words.number, words.amount))(rng)
    face = style.face(rng, 0.4)
    em = style.em(rng, face, text if target else None, 13.0)
    if em is None:
        return None
    step = pitch(rng, em)
    run = Run(text, face, em, 0.0, baseline(face, em, step), style.color(rng))
    return Block([run], advance(face, text, em), step, Ask(kind, "", 0, 0, len(text)))


def title(rng: Random, style: Style, target: bool) -> Block | None:
    """A heading of one or two words, larger or bolder than the rest, often with a rule below."""
    text = style.word(rng, 10)
    if rng.random() < 0.4 and len(text) <= 8:
        second = style.word(rng, 11 - len(text) if target else 9)
        text = f"{text} {second.upper() if text.isupper() else second}"
    face = style.faces[-1] if rng.random() < 0.7 else style.faces[0]
    em = style.em(rng, face, text if target else None, 15.0)
    if em is None or (target and len(text) > LONGEST_ANSWER):
        return None
    step = pitch(rng, em)
    run = Run(text, face, em, 0.0, baseline(face, em, step), style.color(rng))
    block = Block([run], advance(face, text, em), step + 2, Ask("title", "", 0, 0, len(text)))
    block.rule = style.ink if rng.random() < 0.4 else None
    return block


def prose(rng: Random, style: Style, room: int, digits: bool = True, letters: bool = True) -> Block | None:
    """One to three lines that nothing is asked about."""
    face = style.face(rng)
    em = style.em(rng, face, None, 9.0)
    if em is None:
        return None
    step, color = pitch(rng, em), style.color(rng)
    runs: list[Run] = []
    width = 0.0
    for _ in range(rng.randint(1, max(1, min(3, room)))):
        parts = []
        for _ in range(rng.randint(1, 4)):
            if letters and (not digits or rng.random() < 0.8):
                parts.append(style.word(rng, 9))
            else:
                kinds = (words.number, words.amount, words.percent, words.phone)
                parts.append(rng.choice((*kinds, words.code, words.date, words.clock) if letters else kinds)(rng))
        text = " ".join(parts) + rng.choice(("", "", ".", ",")) * letters
        while parts and advance(face, text, em) > style.width:
            parts.pop()
            text = " ".join(parts)
        if parts:
            width = max(width, advance(face, text, em))
            runs.append(Run(text, face, em, 0.0, len(runs) * step + baseline(face, em, step), color))
    return Block(runs, width, max(1, len(runs)) * step) if runs else None


def around_shape(block: Block) -> list[Ask]:
    """The texts above and below a block's shape."""
    mark = block.marks[0]
    return [
        Ask("above" if run.y < mark.cy else "below", mark.shape, i, 0, len(run.text), -1)
        for i, run in enumerate(block.runs)
    ]


def along_line(run: int, text: str) -> list[Ask]:
    """ "gate B12 open" can be asked for as a whole by its first word, or for what follows a word."""
    found, start = [], 0
    words = text.split(" ")
    if len(words) > 1 and _names(words[0]):
        found.append(Ask("line", words[0], run, 0, len(text)))
    for word in words[:-1]:
        start += len(word) + 1
        if _names(word) and start < len(text):
            found.append(Ask("after", word, run, start, len(text)))
    return found


def _names(word: str) -> bool:
    """Whether a word can stand for its place: long enough to be the only one of its kind on the page."""
    return len(word) >= 3 and word.isalpha()

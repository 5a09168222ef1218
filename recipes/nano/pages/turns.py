"""Adds to a page what else it can teach: further questions, pairs that belong together, its whole text.

A place in the text is a *span*: (block, run, start, end), `end` None for the whole rest of the run.
"""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from recipes.nano.pages.blocks import Ask, Block, along_line, around_shape
from recipes.nano.pages.questions import phrase

SAME_LINE = 4.0  # canvas pixels between baselines
LONGEST_READ = 20


class Span(NamedTuple):
    """Characters `start` to `end` of one run of one block; `run` -1 is the block's shape."""

    block: int
    run: int
    start: int
    end: int


class Turn(NamedTuple):
    """A question with its answer, where the answer stands, and what names its place (a label, a shape, a word)."""

    kind: str
    question: str
    answer: str
    span: Span
    anchors: tuple[Span, ...]


@dataclass(frozen=True)
class Link:
    """Two texts that belong together: a value and its label ("left": on one line, "up": one above the other)."""

    way: str
    value: Span
    label: Span


def turns(blocks: list[Block], question: str, rng: Random, most: int) -> list[Turn]:
    """The page's own question and up to `most` further ones; labels and shapes come before mere succession.

    Labels, shapes and words do not repeat on a page, so what names one of them is unambiguous. Whether a seam cuts
    the further answers is left to chance.
    """
    own = blocks[0].ask
    assert own is not None
    found = [(number, ask) for number, block in enumerate(blocks) for ask in asks(block)]
    same = [ask for number, ask in found if number == 0 and ask[2:5] == own[2:5]]
    first = _turn(blocks, 0, same[0] if same else own, question)
    found = [one for one in found if one[0] or one[1] not in same]
    found = [one for one in found if 0 < one[1].end - one[1].start <= LONGEST_READ]
    rng.shuffle(found)
    found.sort(key=lambda one: one[1].kind in ("line", "after"))
    return [first] + [_turn(blocks, number, ask, phrase(rng, ask.kind, ask.subject)) for number, ask in found[:most]]


def asks(block: Block) -> list[Ask]:
    """Everything that can be asked about a block."""
    if block.asks:
        return block.asks
    if block.marks:
        return around_shape(block)
    if block.ask is not None and block.ask.kind in ("field", "date"):
        return [
            Ask("field", block.runs[i].text.rstrip(":- "), i + 1, 0, len(block.runs[i + 1].text), i)
            for i in range(0, len(block.runs), 2)
        ]
    return [ask for i, run in enumerate(block.runs) for ask in along_line(i, run.text)]


def links(blocks: list[Block]) -> list[Link]:
    """The pairs that belong together on a page, asked or not: value and label, word and shape, word and predecessor."""
    found = []
    for number, block in enumerate(blocks):
        for ask in asks(block):
            value = Span(number, ask.run, ask.start, ask.end)
            for anchor in (ask.anchor, ask.above):
                if anchor is None:
                    continue
                label = Span(number, anchor, 0, 0 if anchor < 0 else len(block.runs[anchor].text))
                level = anchor >= 0 and abs(block.runs[anchor].y - block.runs[ask.run].y) < SAME_LINE
                found.append(Link("left" if level else "up", value, label))
        for i, run in enumerate(block.runs):
            at = 0
            for word, following in zip(run.text.split(" ")[:-1], run.text.split(" ")[1:], strict=True):
                start = at + len(word) + 1
                if word and following:
                    found.append(Link("left", Span(number, i, start, start + 1), Span(number, i, at, start - 1)))
                at = start
    return found


def reading_lines(blocks: list[Block]) -> list[str]:
    """The page's text line by line, as one reads it: runs whose baselines nearly agree are one line, left to right."""
    runs = sorted((block.y + run.y, block.x + run.x, run.text) for block in blocks for run in block.runs)
    lines: list[tuple[float, list[tuple[float, str]]]] = []
    for y, x, text in runs:
        if not lines or y - lines[-1][0] > SAME_LINE:
            lines.append((y, []))
        lines[-1][1].append((x, text))
    return [" ".join(text for _, text in sorted(line)) for _, line in lines]


def _turn(blocks: list[Block], number: int, ask: Ask, question: str) -> Turn:
    block = blocks[number]
    anchors = tuple(
        Span(number, anchor, 0, 0 if anchor < 0 else len(block.runs[anchor].text))
        for anchor in (ask.anchor, ask.above)
        if anchor is not None
    )
    if ask.kind == "after":
        anchors = (Span(number, ask.run, 0, ask.start - 1),)
    elif ask.kind == "line":
        anchors = (Span(number, ask.run, 0, len(ask.subject)),)
    answer = block.runs[ask.run].text[ask.start : ask.end]
    return Turn(ask.kind, question, answer, Span(number, ask.run, ask.start, ask.end), anchors)

"""What else a page can teach: more questions beside the one it was made for, and its whole text."""

from random import Random

from recipes.nano.pages.blocks import LONGEST_ANSWER, Block
from recipes.nano.pages.questions import phrase

SAME_LINE = 5.0  # canvas pixels between baselines


def further_questions(blocks: list[Block], asked: tuple[str, str], rng: Random, most: int) -> list[tuple[str, str]]:
    """Up to `most` further (question, answer) pairs; labels and shapes come before mere succession.

    Labels, shapes and words do not repeat on a page, so what names one of them is unambiguous. Whether a seam cuts
    these answers is left to chance.

    Args:
        blocks: the page's blocks.
        asked: the page's own question and answer, which is not asked twice.
    """
    found: list[tuple[str, str, str]] = []
    for block in blocks:
        if block.marks:
            found += _around_shape(block)
        elif block.ask is not None and block.ask.kind in ("field", "date"):
            pairs = zip(block.runs[::2], block.runs[1::2], strict=True)
            found += [("field", label.text.rstrip(":- "), value.text) for label, value in pairs]
        else:
            found += [turn for run in block.runs for turn in _along_line(run.text)]
    found = [turn for turn in found if 0 < len(turn[2]) <= LONGEST_ANSWER and turn[2] != asked[1]]
    rng.shuffle(found)
    found.sort(key=lambda turn: turn[0] in ("line", "after"))
    return [(phrase(rng, kind, subject), answer) for kind, subject, answer in found[:most]]


def reading_lines(blocks: list[Block]) -> list[str]:
    """The page's text line by line, as one reads it: runs whose baselines nearly agree are one line, left to right."""
    runs = sorted((block.y + run.y, block.x + run.x, run.text) for block in blocks for run in block.runs)
    lines: list[tuple[float, list[tuple[float, str]]]] = []
    for y, x, text in runs:
        if not lines or y - lines[-1][0] > SAME_LINE:
            lines.append((y, []))
        lines[-1][1].append((x, text))
    return [" ".join(text for _, text in sorted(line)) for _, line in lines]


def _around_shape(block: Block) -> list[tuple[str, str, str]]:
    mark = block.marks[0]
    return [("above" if run.y < mark.cy else "below", mark.shape, run.text) for run in block.runs]


def _along_line(text: str) -> list[tuple[str, str, str]]:
    """ "gate B12 open" can be asked for as a whole by its first word, or for what follows a word."""
    words = text.split(" ")
    turns = [("line", words[0], text)] if len(words) > 1 and _names(words[0]) else []
    return turns + [("after", words[i], " ".join(words[i + 1 :])) for i in range(len(words) - 1) if _names(words[i])]


def _names(word: str) -> bool:
    """Whether a word can stand for its place: long enough to be the only one of its kind on the page."""
    return len(word) >= 3 and word.isalpha()

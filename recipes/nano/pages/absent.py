"""Adds questions about what a page does not hold; their answer is "not found".

They are of the kinds that the page itself is asked, about labels, words and shapes of the same lists. What a person
might still answer from the page is not asked: a label that shares a word with it, or that means the same.
"""

# ruff: noqa: SIM905  (lists of words are easier to read and to extend as text)
from dataclasses import replace
from random import Random

from recipes.nano.pages import words
from recipes.nano.pages.blocks import SHAPES
from recipes.nano.pages.questions import phrase
from recipes.nano.pages.sample import Asked, Sample

KIND, ANSWER = "absent", "not found"
VAGUE = frozenset("date time name first item items amount price cost number code".split())
ALIKE = tuple(
    frozenset(group.split())
    for group in (
        "tel phone mobile call fax",
        "total sum due gross balance subtotal net",
        "tax vat",
        "fee fare price cost",
        "start begins opens opened born issued",
        "end closes expires deadline",
        "clerk cashier",
        "customer client guest",
        "ref booking order ticket",
        "bus route",
        "share rate",
        "city street country",
        "cash card paid",
        "qty items stock unit",
    )
)
HEADS = frozenset(label.lower() for labels in words.LABELS.values() for label in labels)
_ATTEMPTS = 12


def with_absent(sample: Sample, rng: Random, split: str, share: float) -> Sample:
    """The same page with further questions, so that `share` of all are about what it does not hold.

    They stand anywhere in the conversation; the sample's own question stays what it is scored by.
    """
    if not share:
        return sample
    asked, taken = list(sample.asked), page_words(sample.lines)
    for one in sample.asked:
        if rng.random() < share / (1 - share):
            question = ask_absent(rng, split, one, taken, shown_shapes(sample))
            if question is not None:
                asked.insert(rng.randrange(len(asked) + 1), Asked(KIND, question, ANSWER, [], []))
    return replace(sample, asked=asked)


def page_words(lines: list[str]) -> set[str]:
    """The words of a page, lower case, without the signs around them."""
    return {word.strip(".,:;-#()?").lower() for line in lines for word in line.split()}


def shown_shapes(sample: Sample) -> set[str]:
    """The names of the shapes on the page."""
    drawn = {glyph.char for glyph in sample.glyphs}
    return {name for name, char in SHAPES.items() if char in drawn}


def ask_absent(rng: Random, split: str, like: Asked, taken: set[str], shapes: set[str]) -> str | None:
    """A question of the same kind as `like` about what is not on the page; None where nothing of the kind is absent.

    The name that it asks about is added to `taken`.
    """
    kind = like.kind
    if kind in ("above", "below"):
        left = sorted(SHAPES.keys() - shapes)
        return phrase(rng, kind, rng.choice(left)) if left else None
    if kind in ("line", "after", "item", "quantity"):
        name = _word(rng, split, taken)
        return phrase(rng, kind, words.cased(rng, name))
    here = sorted(HEADS & taken)
    label = rng.choice(here) if kind == "cell" and here and rng.random() < 0.6 else _label(rng, split, taken)
    if label is None:
        return None
    if kind == "cell":  # a heading that is there, or is not, of a row that is not
        return phrase(rng, kind, f"{label} of {words.cased(rng, _word(rng, split, taken))}")
    return phrase(rng, "date" if kind == "date" else "field", label)


def _word(rng: Random, split: str, taken: set[str]) -> str:
    while True:
        found = words.word(rng, split, 9)
        if found not in taken:
            taken.add(found)
            return found


def _label(rng: Random, split: str, taken: set[str]) -> str | None:
    for _ in range(_ATTEMPTS):
        label, _ = words.labels(rng, split, 1)[0]
        parts = set(label.lower().split())
        alike = parts.union(*(group for group in ALIKE if group & parts))
        if not (alike & taken or parts & VAGUE):
            taken.update(parts)
            return label
    return None

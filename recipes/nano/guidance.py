"""Guided attention: tells single heads of the language model where to look, from what the generator knows of a page.

Heads of the second layer learn which patches belong together, while the picture is read, and the place that a question
names, at the question's end. One head of the third layer looks, per character of an answer, at that character's patch.
The loss of a head is the mean of -log of its attention there. The model itself does not change, and heads are free
again once training ends.

    read_first, read_next   an answer's first character (see `first_place`), and each following one: its own patch
    left, up                first patch of a value: last patch of its label, beside it or above; likewise of a shape
    find                    the end of a question: the label, word or shape that names the place

Shapes: L text length, D width, d width of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fila.geometry import Layout
from recipes.nano.pages.sample import Asked, Sample


class Head(NamedTuple):
    """The head that learns to look, and the weight of its loss."""

    layer: int
    head: int
    weight: float


HEADS = {
    "read_first": Head(2, 0, 0.5),
    "read_next": Head(2, 0, 1.0),
    "left": Head(1, 1, 0.5),
    "up": Head(1, 2, 1.5),
    "find": Head(1, 3, 0.5),
}
Guides = dict[
    str, Tensor
]  # for each of `HEADS`, [n, 2]: text positions that look, and the positions that they should look at


def token_of(layout: Layout, y: float, x: float) -> int | None:
    """The image token of the tile patch at a place of the canvas, None where unpadding dropped it."""
    patch, grid = layout.geometry.patch, layout.geometry.grid
    row, column = int(y // patch), int(x // patch)
    if not layout.rows:
        return row * grid + column if 0 <= row < grid and 0 <= column < grid else None
    rows, columns = layout.token_rows
    row -= (layout.rows * grid - rows) // 2
    column -= (layout.columns * grid - columns) // 2
    return grid * grid + row * (columns + 1) + column if 0 <= row < rows and 0 <= column < columns else None


def guides(sample: Sample, layout: Layout, first_image_token: int, said: list[int]) -> Guides:
    """The positions of a page's conversation that each head should look from and at.

    Args:
        said: for each of `sample.asked` the position of the answer's first character.
    """
    tokens = [token_of(layout, g.line, g.cx) for g in sample.glyphs]
    places = [None if token is None else first_image_token + token for token in tokens]
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in HEADS}
    for asked, start in zip(sample.asked, said, strict=True):
        for i, glyph in enumerate(asked.glyphs):
            place = places[glyph] if i else first_place(asked, start, places)
            if place is not None:  # a character is said by the position before it
                found["read_next" if i else "read_first"].append((start + i - 1, place))
        for glyph in asked.anchors[:1]:
            place = places[glyph]
            if place is not None:
                found["find"].append((start - 1, place))
    for way, value, label in sample.links:
        one, other = places[value], places[label]
        if one is not None and other is not None and one != other:  # only what comes later can look back
            found[way].append((max(one, other), min(one, other)))
    return {name: torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2) for name, pairs in found.items()}


def first_place(asked: Asked, start: int, places: list[int | None]) -> int | None:
    """The position at which an answer's first character can be known, None where it was dropped.

    That is its own patch, with two exceptions. A line that the question quotes the beginning of is begun from the
    question. A text that stands before the shape or label that names it cannot know its name, since attention looks
    back only; the shape has looked at the text ("up") and stands for it.
    """
    if asked.kind == "line":
        quoted = asked.question.rfind(asked.answer.split()[0])
        if quoted >= 0:
            return start - 1 - len(asked.question) + quoted  # <assistant> stands between the question and the answer
    place = places[asked.glyphs[0]]
    names = [p for p in (places[glyph] for glyph in asked.anchors[:1]) if p is not None]
    return max([place, *names]) if place is not None and asked.kind != "line" else place


class Guidance:
    """Listens to a language model's attention layers during one forward pass and gives the losses of `HEADS`.

    Example:
        with Guidance(model.language_model) as guidance:
            model(...)
        losses = guidance.losses(batch.guides)
    """

    def __init__(self, language_model: nn.Module):
        layers: Any = language_model.layers
        self.layers = {layer: layers[layer].self_attn for layer in {h.layer for h in HEADS.values()}}
        self.inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> "Guidance":
        def listen(layer: int):
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                self.inputs[layer] = states, kwargs["position_embeddings"]

            return hook

        self.hooks = [m.register_forward_pre_hook(listen(n), with_kwargs=True) for n, m in self.layers.items()]
        return self

    def __exit__(self, *args: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def losses(self, batch: list[Guides]) -> dict[str, Tensor]:
        """The mean over the batch of each head's -log attention, unweighted; heads that nobody asks are left out."""
        found = {}
        for name, head in HEADS.items():
            parts = [self._surprise(head, i, guide[name]) for i, guide in enumerate(batch) if len(guide[name])]
            if parts:
                found[name] = torch.cat(parts).mean()
        return found

    def _surprise(self, head: Head, row: int, pairs: Tensor) -> Tensor:
        """-log attention of one head in one page, for [n, 2] positions and their targets: [n]."""
        attention, (states, (cos, sin)) = self.layers[head.layer], self.inputs[head.layer]
        size = attention.head_dim
        part = slice(head.head * size, (head.head + 1) * size)
        cos, sin = cos[row % len(cos)], sin[row % len(sin)]
        looks, seen = pairs.unbind(1)
        query = nn.functional.linear(states[row, looks], attention.q_proj.weight[part])  # [n, d]
        key = nn.functional.linear(states[row], attention.k_proj.weight[part])  # [L, d]
        query = query * cos[looks] + _turned(query) * sin[looks]
        key = key * cos + _turned(key) * sin
        scores = (query @ key.T).float() * attention.scaling
        future = torch.arange(len(key))[None] > looks[:, None]
        return -scores.masked_fill(future, float("-inf")).log_softmax(-1).gather(1, seen[:, None])[:, 0]


def _turned(x: Tensor) -> Tensor:
    """The other half of a rotation by position, as Llama pairs its channels."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)

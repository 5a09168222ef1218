"""Defines a planned page: what is composed, and then drawn."""

from dataclasses import dataclass

from fila.geometry import Layout
from recipes.nano.pages.blocks import Block, Style


@dataclass
class Page:
    """A planned page; the first block holds the answer."""

    layout: Layout
    style: Style
    blocks: list[Block]
    kind: str
    question: str
    cut: bool
    wear_seed: int | None  # None: drawn clean

    @property
    def answer(self) -> str:
        return self.blocks[0].answer

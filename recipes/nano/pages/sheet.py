"""The sheet that documents are written on: margins, one text size, and the place where the next line begins."""

from random import Random

from fila.geometry import Layout
from recipes.nano.pages.blocks import Ask, Block, Run, Stroke, Style, advance, baseline

CAPS = (5.0, 12.0)  # height of a capital, canvas pixels


class Sheet:
    """A page in the making: parts stand below each other, from the top margin down.

    Args:
        style: colours, faces and the words already used; its paper is white for most documents.
    """

    def __init__(self, rng: Random, style: Style, layout: Layout):
        self.rng, self.style, self.layout = rng, style, layout
        content = layout.content
        if not style.dark and rng.random() < 0.6:
            style.paper = (255, 255, 255) if rng.random() < 0.7 else (255, 253, 246)
        margin = rng.uniform(0.02, 0.1)
        self.left = content.x0 + max(3.0, margin * content.width)
        self.right = content.x1 - max(3.0, margin * content.width)
        self.top = content.y0 + max(2.0, rng.uniform(0.01, 0.1) * content.height)
        self.bottom = content.y1 - 2
        self.y = self.top
        self.face = style.faces[0]
        self.strong = rng.choice(style.faces)
        # Small text is common and hard: low heights are drawn more often.
        cap = CAPS[0] + (CAPS[1] - CAPS[0]) * rng.random() ** 1.6
        cap = min(cap, 0.065 * self.width + 2)
        self.em = cap / self.face.cap_height
        self.step = self.em * rng.uniform(1.25, 2.1)
        self.ink = style.color(rng)
        self.arrangement = rng.random()
        self.mark = rng.choice((":", ":", ":", "", "", " -"))
        self.blocks: list[Block] = []

    @property
    def width(self) -> float:
        return self.right - self.left

    def add(self, block: Block) -> bool:
        """Stands a block at the left margin, below what is there; False where it does not fit."""
        if block.width > self.width + 0.01 or self.y + block.height > self.bottom:
            return False
        block.x, block.y = self.left, self.y
        self.y += block.height
        self.blocks.append(block)
        return True

    def run(self, text: str, x: float, y: float, strong: bool = False, em: float | None = None) -> Run:
        """A run whose line begins at `y`."""
        face, em = self.strong if strong else self.face, em or self.em
        return Run(text, face, em, x, y + baseline(face, em, self.step), self.ink)

    def title(self) -> None:
        rng = self.rng
        text = " ".join(self.style.word(rng, 9) for _ in range(rng.randint(1, 2)))
        text = text.title() if rng.random() < 0.7 else text.upper()
        face = rng.choice(self.style.faces)
        em = self.em * rng.uniform(1.0, 1.7)
        wide = advance(face, text, em)
        if wide > self.width:
            return
        step = max(self.step, em * 1.25)
        x = rng.choice((0.0, (self.width - wide) / 2, (self.width - wide) / 2))
        run = Run(text, face, em, x, baseline(face, em, step), self.style.color(rng))
        block = Block([run], self.width, step, asks=[Ask("title", "", 0, 0, len(text))])
        if self.add(block) and rng.random() < 0.4:
            self.line_across()
        self.y += self.step * rng.uniform(0.0, 0.6)

    def line_across(self) -> None:
        """A rule, at times dashed, from margin to margin."""
        strokes = [Stroke(0.0, 1.0, self.width, 1.0, self.rng.random() < 0.4)]
        self.add(Block([], self.width, self.step * 0.35 + 2, strokes=strokes))

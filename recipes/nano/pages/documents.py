"""Pages as people have them: receipts, forms, letters, lists, tables and charts, with one text size and margins.

They are planned on the model's own canvases, in lines from the top, and everything on them can be asked about. Where a
seam runs is left to chance.
"""

from collections.abc import Callable
from random import Random

from fila.geometry import Geometry
from recipes.nano.pages import blocks as make
from recipes.nano.pages import parts, words
from recipes.nano.pages.blocks import Ask, Block, Run, Stroke, advance
from recipes.nano.pages.compose import draw_layout, make_style
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.page import Page
from recipes.nano.pages.questions import phrase
from recipes.nano.pages.sheet import Sheet
from recipes.nano.pages.turns import LONGEST_READ

CANVAS_SHARES = {(1, 2): 0.06, (2, 1): 0.12, (2, 2): 0.56, (1, 3): 0.08, (3, 1): 0.18}
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def find_document(rng: Random, *, split: str, fonts: FontSet, geometry: Geometry) -> Page:
    """Plans documents until one has something to ask about."""
    while True:
        layout = draw_layout(rng, geometry, CANVAS_SHARES)
        style = make_style(rng, split, fonts, layout)
        found = Document(rng, style, layout).plan()
        asked = [(block, ask) for block in found for ask in block.asks if ask.end - ask.start <= LONGEST_READ]
        if not asked:
            continue
        own, own.ask = rng.choice(asked)
        found.sort(key=lambda block: block is not own)
        assert own.ask is not None
        question = phrase(rng, own.ask.kind, own.ask.subject)
        wear = rng.getrandbits(32) if rng.random() < 0.6 else None
        return Page(layout, style, found, own.ask.kind, question, False, wear)


class Document(Sheet):
    """One document: `plan` stacks parts until the page is full."""

    def plan(self) -> list[Block]:
        rng = self.rng
        if rng.random() < 0.12:
            self.chart()
            return self.blocks
        if rng.random() < 0.55:
            self.title()
        for _ in range(rng.choice((1, 2, 3, 4, 6, 8))):
            part = rng.choices(tuple(PARTS), tuple(PARTS.values()))[0]
            part(self)
            self.y += self.step * rng.choice((0.0, 0.2, 0.5, 1.0))
            if rng.random() < 0.25:
                self.line_across()
        return self.blocks

    def fields(self) -> None:
        """Labelled lines: the value after its label, in a column, at the right margin, or below its label."""
        rng = self.rng
        labels = self.style.labels(rng, rng.randint(1, 7))
        case = rng.random()
        labels = [(t.upper() if case < 0.12 else t.lower() if case < 0.18 else t, kind) for t, kind in labels]
        strong = rng.random() < 0.3
        texts = [label + self.mark for label, _ in labels]
        column = max((advance(self.face, t, self.em) for t in texts), default=0.0) + self.em * rng.uniform(0.5, 2.5)
        gap, underlined = self.em * rng.uniform(0.28, 0.45), rng.random() < 0.08
        for text, (label, kind) in zip(texts, labels, strict=True):
            value = words.value(rng, self.style.split, kind)
            wide = advance(self.strong if strong else self.face, value, self.em)
            stacked = self.arrangement > 0.85
            x = (
                0.0 if stacked
                else advance(self.face, text, self.em) + gap if self.arrangement < 0.35
                else column if self.arrangement < 0.6
                else self.width - wide
            )  # fmt: skip
            if not stacked and x < advance(self.face, text, self.em) + gap - 0.01:
                continue
            y = self.step if stacked else 0.0
            runs = [self.run(text, 0.0, 0.0), self.run(value, x, y, strong)]
            block = Block(runs, x + wide, y + self.step)
            block.asks = [parts.label_ask(rng, label, kind, 1, len(value), 0)]
            if underlined:
                block.strokes = [Stroke(x, y + self.step * 0.95, x + wide, y + self.step * 0.95)]
            if rng.random() < 0.06:
                block.width = max(block.width, min(self.width, block.width + 10))
                self.highlight(block)
            self.add(block)

    def highlight(self, block: Block) -> None:
        """A tinted panel, a frame, or an inverted line."""
        r = self.rng.random()
        if r < 0.4:
            block.border = self.style.ink
        elif r < 0.8 or self.style.dark:
            shift = 30 if self.style.dark else -25
            block.fill = tuple(min(255, max(0, c + shift)) for c in self.style.paper)  # type: ignore[assignment]
        else:
            block.fill = self.style.ink
            block.runs = [run._replace(color=self.style.paper) for run in block.runs]

    def table(self) -> None:
        """Rows and columns with headings; a cell is named by both."""
        rng, style = self.rng, self.style
        rows, heads = rng.randint(1, 5), style.labels(rng, rng.randint(1, 3))
        columns = len(heads)
        if not columns:  # every label it drew is on the page already
            return
        corner = rng.choice(("", "", "Item", "Name", "Day"))
        names = [style.word(rng, 8) for _ in range(rows)]
        if rng.random() < 0.12 and not style.used.intersection(day.lower() for day in DAYS):
            corner, names = "Day", rng.sample(DAYS, rows)
            style.used.update(day.lower() for day in names)
        strong = rng.random() < 0.5
        cells = [[words.value(rng, style.split, kind) for _, kind in heads] for _ in names]
        if len({cell for row in cells for cell in row}) < len(names) * len(heads):
            return
        texts = [[corner, *(h for h, _ in heads)], *([n, *row] for n, row in zip(names, cells, strict=True))]
        widths = [
            max(
                advance(self.strong if strong and i == 0 else self.face, row[c], self.em) for i, row in enumerate(texts)
            )
            for c in range(columns + 1)
        ]
        spare = self.width - sum(widths)
        gap = self.em * 0.7
        if spare < gap * columns or self.y + self.step * len(texts) > self.bottom:
            return
        gap = rng.uniform(gap, max(gap, min(spare / columns, self.em * 4)))
        runs: list[Run] = []
        place: dict[tuple[int, int], int] = {}
        flush = rng.random() < 0.5
        for i, row in enumerate(texts):
            x = 0.0
            for c, text in enumerate(row):
                face = self.strong if strong and i == 0 else self.face
                shift = widths[c] - advance(face, text, self.em) if flush and c else 0.0
                if text:
                    place[i, c] = len(runs)
                    runs.append(self.run(text, x + shift, i * self.step, strong and i == 0))
                x += widths[c] + gap
        block = Block(runs, sum(widths) + gap * columns, self.step * len(texts))
        for i, name in enumerate(names, 1):
            for c, (head, _) in enumerate(heads, 1):
                end = len(texts[i][c])
                form = rng.choice(("{h} of {n}", "{h} of {n}", "{h} for {n}", "{n} {h}"))
                subject = form.format(h=head, n=name) if columns > 1 or rng.random() < 0.5 else name
                block.asks.append(Ask("cell", subject, place[i, c], 0, end, place[i, 0], place[0, c]))
        if rng.random() < 0.5:
            every = rng.random() < 0.5
            block.strokes = [
                Stroke(0.0, i * self.step, block.width, i * self.step)
                for i in range(len(texts) + 1) if every or i == 1
            ]  # fmt: skip
            if every and rng.random() < 0.5:
                x = 0.0
                for c in range(columns):
                    x += widths[c] + gap
                    block.strokes.append(Stroke(x - gap / 2, 0.0, x - gap / 2, block.height))
        self.add(block)

    def price_list(self) -> None:
        """Things with their amounts at the right margin, as on a receipt."""
        rng, style = self.rng, self.style
        kind = rng.choice(("amount", "amount", "amount", "number", "time", "percent"))
        for _ in range(rng.randint(2, 7)):
            name = style.word(rng, 9)
            if rng.random() < 0.25:
                name = f"{name} {style.word(rng, 6)}"
            value = words.value(rng, style.split, kind)
            wide = advance(self.face, value, self.em)
            if advance(self.face, name, self.em) + wide + self.em > self.width:
                continue
            runs = [self.run(name, 0.0, 0.0), self.run(value, self.width - wide, 0.0)]
            block = Block(runs, self.width, self.step)
            block.asks = [Ask("item" if kind == "amount" else "field", name, 1, 0, len(value), 0)]
            self.add(block)

    def prose(self) -> None:
        """Lines of words and numbers, ragged at the right."""
        rng, style = self.rng, self.style
        for _ in range(rng.randint(1, 5)):
            text = ""
            for _ in range(12):
                word = style.word(rng, 9) if rng.random() < 0.85 else words.number(rng)
                longer = f"{text} {word}".strip()
                if advance(self.face, longer, self.em) > self.width * rng.uniform(0.6, 1.0):
                    break
                text = longer
            if text:
                block = Block([self.run(text, 0.0, 0.0)], advance(self.face, text, self.em), self.step)
                block.asks = make.along_line(0, text)
                self.add(block)

    def chart(self) -> None:
        """Marks with a word above and a number below each, at times between axes."""
        rng = self.rng
        self.title()
        if rng.random() < 0.5:
            height = self.bottom - self.y
            strokes = [Stroke(0.0, 0.0, 0.0, height), Stroke(0.0, height, self.width, height)]
            self.blocks.append(Block([], 0.0, 0.0, strokes=strokes, x=self.left, y=self.y))
        placed: list[Block] = []
        for _ in range(12):
            block = make.shape(rng, self.style, False, em=self.em, color=self.ink)
            if block is None:
                break
            for _ in range(8):
                free_x, free_y = self.width - 8 - block.width, self.bottom - 2 - self.y - block.height
                if free_x < 0 or free_y < 0:
                    break
                block.x, block.y = self.left + 4 + rng.random() * free_x, self.y + rng.random() * free_y
                if all(
                    b.x > block.x + block.width + 3 or b.x + b.width + 3 < block.x
                    or b.y > block.y + block.height or b.y + b.height < block.y
                    for b in placed
                ):  # fmt: skip
                    block.asks = make.around_shape(block)
                    placed.append(block)
                    break
        self.blocks += placed


PARTS: dict[Callable[[Document], None], float] = {
    Document.fields: 4,
    Document.table: 3,
    Document.price_list: 1,
    Document.prose: 2,
    parts.receipt: 2,
    parts.ticket: 2,
    parts.wrapped: 1,
    parts.sentence: 2,
    parts.greeting: 1.5,
}  # how often each is drawn

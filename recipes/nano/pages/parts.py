"""Parts of documents that people ask about by who, when, where and how much: receipts, tickets, forms and letters.

Each function writes one part onto a `Sheet`, below what is there, and leaves it out where it does not fit.
"""

# ruff: noqa: SIM905  (lists of words are easier to read and to extend as text)
from random import Random

from recipes.nano.pages import words
from recipes.nano.pages.blocks import Ask, Block, Run, Stroke, advance
from recipes.nano.pages.sheet import Sheet

PERSONS = frozenset("clerk cashier author manager guest driver client teacher owner contact".split())
PLACES = frozenset("gate room seat platform table floor zone bay aisle locker track box city street country".split())
# How one asks for the time or the day that stands behind a label.
MOMENTS = {
    "issued": "was it issued", "expires": "does it expire", "start": "does it start", "end": "does it end",
    "delivered": "was it delivered", "printed": "was it printed", "signed": "was it signed",
    "opened": "was it opened", "updated": "was it updated", "deadline": "is the deadline", "due date": "is it due",
    "departs": "does it depart", "arrives": "does it arrive", "opens": "does it open", "closes": "does it close",
    "begins": "does it begin", "checkout": "is checkout", "boarding": "is boarding",
}  # fmt: skip
QUALIFIERS = tuple("order delivery first last new old next home work monthly daily travel main guest group".split())
OPENINGS = ("Dear {n},", "Hello {n},", "Hi {n},", "To: {n}", "Dear {n}")
CLOSINGS = ("Yours, {n}", "Regards, {n}", "Best, {n}", "Love, {n}", "Signed: {n}", "From: {n}")
SENTENCES = (("The", "is"), ("Your", "is"), ("Our", "is"), ("The", "was"), ("The new", "is"), ("Your", "will be"))
SUMS = (("Subtotal", "Net", "Sum"), ("Tax", "Tip", "Fee"), ("Total", "Amount due", "Grand total", "Total", "Total"),
        ("Cash", "Card", "Paid"), ("Change", "Balance"))  # fmt: skip


def label_ask(rng: Random, label: str, kind: str, run: int, end: int, anchor: int) -> Ask:
    """What is asked about a labelled value: mostly the label, at times who, when or where."""
    plain = label.lower()
    if rng.random() < 0.7:
        if plain in PERSONS:
            return Ask("who", label, run, 0, end, anchor)
        if plain in PLACES:
            return Ask("where", label, run, 0, end, anchor)
        if plain in MOMENTS:
            return Ask("when", MOMENTS[plain], run, 0, end, anchor)
    numbered = label.capitalize() in words.NUMBERED and kind == "number"
    subject = f"{label} number" if numbered and rng.random() < 0.3 else label
    return Ask("date" if kind == "date" else "field", subject, run, 0, end, anchor)


def receipt(sheet: Sheet) -> None:
    """Things with their amounts, at times with how many of each, and what they sum up to, all flush right."""
    rng, style = sheet.rng, sheet.style
    sign = rng.choice(("", "", "$"))
    counted = rng.random()
    indent = advance(sheet.face, "99 x ", sheet.em) if counted < 0.4 else 0.0
    for _ in range(rng.randint(1, 6)):
        name = style.word(rng, 9).capitalize() if rng.random() < 0.7 else style.word(rng, 9)
        count = str(rng.randint(1, 9) if rng.random() < 0.8 else rng.randint(10, 99))
        money = f"{sign}{rng.randrange(10 ** rng.randint(1, 3))}.{rng.randrange(100):02d}"
        many: list[tuple[str, float | None]] = []
        if counted < 0.2:
            many = [(f"{count} x", 0.0)]
        elif counted < 0.4:
            many = [(count, 0.0)]
        _priced(sheet, [*many, (name, indent), (money, None)], "item", name)
    if rng.random() < 0.5:
        sheet.line_across()
    for choices in SUMS:
        label = rng.choice(choices)
        if rng.random() < 0.6 and label.lower() not in style.used:
            style.used.add(label.lower())
            label = label.upper() if rng.random() < 0.25 else label
            money = f"{sign}{rng.randrange(10 ** rng.randint(1, 3))}.{rng.randrange(100):02d}"
            _priced(sheet, [(label + sheet.mark, 0.0), (money, None)], "field", label)


def _priced(sheet: Sheet, texts: list[tuple[str, float | None]], kind: str, name: str) -> None:
    """One line of a receipt: perhaps how many, then the name, then the amount; with each, where it begins.

    None begins where it ends flush right.
    """
    runs: list[Run] = []
    pen = 0.0
    for text, at in texts:
        wide = advance(sheet.face, text, sheet.em)
        x = sheet.width - wide if at is None else at
        if runs and x < pen + sheet.em * 0.3:
            return
        runs.append(sheet.run(text, x, 0.0))
        pen = x + wide
    if pen > sheet.width + 0.01:
        return
    last = len(runs) - 1
    block = Block(runs, sheet.width, sheet.step)
    block.asks = [Ask(kind, name, last, 0, len(runs[last].text), last - 1)]
    if last == 2:
        block.asks.append(Ask("quantity", name, 0, 0, len(runs[0].text.removesuffix(" x")), 1))
    sheet.add(block)


def ticket(sheet: Sheet) -> None:
    """Two or three values side by side, each under its label, as on a boarding pass."""
    rng, style = sheet.rng, sheet.style
    labels = style.labels(rng, rng.randint(2, 3))
    columns = len(labels)
    if not columns:
        return
    shift = sheet.width / columns
    strong, low = rng.random() < 0.4, rng.random() < 0.4
    case = rng.random()
    runs: list[Run] = []
    block = Block(runs, sheet.width, 2 * sheet.step)
    for column, (label, kind) in enumerate(labels):
        text = label.upper() if case < 0.35 else label
        value = words.value(rng, style.split, kind)
        x = column * shift
        face = sheet.strong if strong else sheet.face
        if max(advance(sheet.face, text, sheet.em), advance(face, value, sheet.em)) > shift - sheet.em * 0.6:
            continue
        # At times the value stands above its label, as a figure above its caption.
        runs.append(sheet.run(text, x, sheet.step if low and case < 0.2 else 0.0))
        runs.append(sheet.run(value, x, 0.0 if low and case < 0.2 else sheet.step, strong))
        block.asks.append(label_ask(rng, text, kind, len(runs) - 1, len(value), len(runs) - 2))
    if not runs:
        return
    if rng.random() < 0.25:
        block.strokes = [Stroke(0.0, block.height - 0.5, block.width, block.height - 0.5)]
    sheet.add(block)


def wrapped(sheet: Sheet) -> None:
    """Labels of two words on two lines, their values beside the first or the second."""
    rng, style = sheet.rng, sheet.style
    column, beside = sheet.width * rng.uniform(0.35, 0.6), rng.random() < 0.5
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(words.VALUE_TYPES)
        first, second = rng.choice(QUALIFIERS).capitalize(), rng.choice(words.LABELS[kind]).lower()
        if " " in second or second in style.used or first.lower() in style.used or first.lower() == second:
            continue
        value = words.value(rng, style.split, kind)
        wide = advance(sheet.face, value, sheet.em)
        widest = max(advance(sheet.face, text, sheet.em) for text in (first, second + sheet.mark))
        if widest + sheet.em * 0.4 > column or column + wide > sheet.width:
            continue
        style.used.update((first.lower(), second, f"{first} {second}".lower()))
        runs = [
            sheet.run(first, 0.0, 0.0),
            sheet.run(second + sheet.mark, 0.0, sheet.step),
            sheet.run(value, column, 0.0 if beside else sheet.step),
        ]
        block = Block(runs, column + wide, 2 * sheet.step)
        named = "date" if kind == "date" else "field"
        near, far = (0, 1) if beside else (1, 0)
        block.asks = [Ask(named, f"{first} {second}", 2, 0, len(value), near, far)]
        sheet.add(block)
        sheet.y += sheet.step * 0.4


def sentence(sheet: Sheet) -> None:
    """A line of a letter that says what something is: "Your seat is 14C."."""
    rng, style = sheet.rng, sheet.style
    labels = style.labels(rng, 1)
    if not labels:
        return
    (label, kind), (article, verb) = labels[0], rng.choice(SENTENCES)
    value, stop = words.value(rng, style.split, kind), rng.choice((".", ".", ""))
    gap = advance(sheet.face, " ", sheet.em)
    runs: list[Run] = []
    x = 0.0
    for text in (article, label.lower(), verb, value + stop):
        runs.append(sheet.run(text, x, 0.0))
        x += advance(sheet.face, text, sheet.em) + gap
    block = Block(runs, x - gap, sheet.step)
    block.asks = [label_ask(rng, label, kind, 3, len(value), 1)]
    sheet.add(block)


def greeting(sheet: Sheet) -> None:
    """The first or the last line of a letter, or thanks in the middle of a receipt; a name at times below."""
    rng, style = sheet.rng, sheet.style
    r = rng.random()
    kind, lines = ("addressee", OPENINGS) if r < 0.45 else ("signer", CLOSINGS) if r < 0.85 else ("", ("Thank you",))
    line = rng.choice(lines)
    first = line.split(" ")[0].lower().rstrip(",:")
    if kind in style.used or first in style.used:
        return
    name = words.name(rng, style.split, 9)
    start = line.find("{n}")
    texts = [line.format(n=name)]
    if kind == "signer" and rng.random() < 0.4:
        texts = [line[:start].rstrip(), name]
    wide = max(advance(sheet.face, text, sheet.em) for text in texts)
    if wide > sheet.width:
        return
    style.used.update((kind or first, first))
    x = rng.choice((0.0, 0.0, (sheet.width - wide) / 2))
    runs = [sheet.run(text, x, i * sheet.step) for i, text in enumerate(texts)]
    block = Block(runs, x + wide, len(texts) * sheet.step)
    if kind:
        start = start if len(texts) == 1 else 0
        block.asks = [Ask(kind, "", len(texts) - 1, start, start + len(name))]
    sheet.add(block)

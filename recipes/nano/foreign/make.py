"""Makes the foreign pages: 40 printed by a headless Chromium, 30 typeset by Typst, 30 plotted by Matplotlib.

    python -m recipes.nano.foreign.make --out FOLDER

Needs `chromium-headless-shell` (a Debian package of that name) and, from PyPI, `typst` and `matplotlib`. Other versions
of them draw other pixels; the pages that are scored are those beside this file.
"""

import argparse
import html
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from recipes.nano.foreign import LABELS
from recipes.nano.pages.sample import NANO_GEOMETRY

SEED = 20261125
TILE = 96
GEOMETRY = replace(
    NANO_GEOMETRY, tile=TILE, canvases=tuple((y * TILE // 64, x * TILE // 64) for y, x in NANO_GEOMETRY.canvases)
)
SIZES = (
    (480, 480),
    (420, 520),
    (540, 420),
    (400, 400),
    (500, 440),
    (300, 600),
    (640, 280),
    (280, 640),
)  # width, height
CAPS = (5.2, 9.0)  # canvas pixels
CAP_HEIGHT = 0.7  # em, of most text faces
ABSENT_EVERY = 3  # one page in so many is also asked for what it does not hold
NAMES = ("Novak", "Iqbal", "Brandt", "Oduya", "Kimura", "Larsen", "Petrov", "Quist", "Ramos", "Tanaka", "Ulrich",
         "Vargas", "Weiss", "Yilmaz", "Zhang", "Abebe", "Bianchi", "Dubois", "Eriksen", "Fischer")  # fmt: skip
TOWNS = ("Lisbon", "Oslo", "Kyoto", "Quito", "Dakar", "Perth", "Tartu", "Bergen", "Cadiz", "Malmo", "Turin", "Gdansk")
THINGS = ("Jazz", "Ceramics", "Optics", "Fencing", "Robotics", "Poetry", "Geology", "Sailing", "Folklore", "Chess")
ROWS = ("Alpha", "Bravo", "Delta", "Echo", "Kilo", "Lima", "Oscar", "Sierra", "Tango", "Zulu")
PERSONS = ("director", "inspector", "pupil", "borrower", "broker")
SHORT = tuple(label for label in LABELS if len(label) < 9 and label not in ("maturity", "employer"))
GOODS = ("salt", "fibre", "parcel", "crate", "pallet", "firmware", "chapter", "dosage")


@dataclass
class Plan:
    """What a page says and how large: the makers below only lay it out.

    `lines` are labels with values; of a table `heads` and `rows`; of a plot of marks `marks`.
    """

    width: int
    height: int
    em: float
    title: str
    lines: list[tuple[str, str]]
    heads: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    marks: list[tuple[str, str, str]] = field(default_factory=list)
    look: int = 0
    questions: list[dict[str, str]] = field(default_factory=list)


def value(rng: Random, label: str) -> str:
    """What may stand behind a label."""
    whole, part = rng.randint(1, 999), rng.randrange(100)
    if label in PERSONS:
        return rng.choice(NAMES)
    if label in ("venue", "harbour", "residence"):
        return rng.choice(TOWNS)
    if label in ("topic", "genre"):
        return rng.choice(THINGS)
    if label == "employer":
        return f"{rng.choice(NAMES)} Ltd"
    if label in ("grade", "parcel", "crate", "pallet", "firmware", "password"):
        letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2))
        return rng.choice((f"{letters}-{whole}", f"{letters[0]}{whole}", f"{whole}{letters}"))
    if label == "payout":
        return f"${whole}.{part:02d}"
    if label == "interval":
        return f"{rng.randint(0, 23):02d}:{part % 60:02d}"
    if label == "maturity":
        return f"{rng.randint(1, 28)} {rng.choice(('Jan', 'Apr', 'Jul', 'Oct'))} {rng.randint(2021, 2039)}"
    if label == "turnout":
        return f"{part}.{whole % 10}%"
    return rng.choice((f"{whole}", f"{whole}", f"{whole}.{part % 10}", f"{whole} {rng.choice(('mg', 'km', 'cm'))}"))


def plan(rng: Random, kind: str, most: int = 7) -> Plan:
    """Draws a page's text, size and questions; at most `most` lines."""
    width, height = rng.choice(SIZES)
    layout = GEOMETRY.layout(height, width)
    scale = layout.content.height / height
    cap = rng.uniform(*CAPS)
    em = round(min(cap / scale / CAP_HEIGHT, width / 15, height / 11), 1)
    room = min(most, int(height / em / 1.9) - 2)
    labels = rng.sample(GOODS if kind == "receipt" else LABELS, min(rng.randint(3, max(3, room)), 7))
    title = rng.choice(("Report", "Notice", "Summary", "Record", "Details", "Overview"))
    made = Plan(width, height, em, title, [], look=rng.randrange(1000))
    if kind == "table":
        columns = 2 if width > 400 or em < 20 else 1
        made.heads = [label.capitalize() for label in rng.sample(SHORT, columns)]
        for row in rng.sample(ROWS, min(room - 1, rng.randint(2, 5))):
            made.rows.append((row, [value(rng, head.lower()) for head in made.heads]))
        cells = [(head, row, said) for row, all_said in made.rows
                 for head, said in zip(made.heads, all_said, strict=True)]  # fmt: skip
        for head, row, said in rng.sample(cells, 2):
            text = rng.choice((f"What is the {head.lower()} of {row}?", f"What is the {head.lower()} for {row}?"))
            made.questions.append({"question": text, "answer": said, "kind": "cell"})
    elif kind == "marks":
        texts = rng.sample(NAMES + TOWNS + THINGS, 8)
        shapes = rng.sample(("square", "circle", "triangle", "star"), rng.randint(2, 4))
        made.marks = [(shape, texts.pop(), str(rng.randint(10, 9999))) for shape in shapes]
        for shape, above, below in rng.sample(made.marks, 2):
            up = rng.random() < 0.5
            made.questions.append({"question": f"What is {'above' if up else 'below'} the {shape}?",
                                   "answer": above if up else below, "kind": "above" if up else "below"})  # fmt: skip
    elif kind == "receipt":
        made.title = rng.choice(("Depot", "Store", "Supply"))
        made.lines = [(label.capitalize(), f"{rng.randint(1, 99)}.{rng.randrange(100):02d}") for label in labels]
        total = sum(float(money) for _, money in made.lines)
        for label, money in rng.sample(made.lines, 2):
            text = rng.choice((f"How much is the {label.lower()}?", f"What is the price of {label.lower()}?"))
            made.questions.append({"question": text, "answer": money, "kind": "item"})
        made.lines.append(("Total", f"{total:.2f}"))
    else:
        made.lines = [(label.capitalize(), value(rng, label)) for label in labels]
        for label, said in rng.sample(made.lines, 2):
            texts = [f"What is the {label.lower()}?", f"What is the {label.lower()}?", f"{label}?"]
            if label.lower() in PERSONS:
                texts.append(f"Who is the {label.lower()}?")
            made.questions.append({"question": rng.choice(texts), "answer": said, "kind": "field"})
    return made


def ask_absent(rng: Random, made: Plan) -> None:
    """Adds a question for a label that the page does not hold."""
    here = {label.lower() for label, _ in made.lines} | {head.lower() for head in made.heads}
    label = rng.choice([label for label in LABELS if label not in here])
    made.questions.append({"question": f"What is the {label}?", "answer": "not found", "kind": "absent"})


def page_of_html(made: Plan, kind: str) -> str:
    """The page as HTML with its style."""
    rng = Random(made.look)
    ink, paper = rng.choice(
        (("#000", "#fff"), ("#222", "#fff"), ("#123", "#f4f6f8"), ("#eee", "#223"), ("#000", "#ffe"))
    )
    family = rng.choice(("Cabin", "Cantarell", "Inter", "Caladea", "Noto Serif", "JetBrains Mono", "Gentium Plus"))
    css = (f"*{{box-sizing:border-box}}body{{margin:0;padding:{made.em:.0f}px;background:{paper};color:{ink};"
           f"font:{made.em}px/1.5 '{family}'}}h1{{font-size:1.25em;margin:0 0 .4em}}p{{margin:0}}"
           "table{border-collapse:collapse}td,th{padding:.1em .6em .1em 0;text-align:left}")  # fmt: skip
    e = html.escape
    lines = [(e(label), e(said)) for label, said in made.lines]
    if kind == "table":
        border = "td,th{border:1px solid;padding:.1em .5em}" if rng.random() < 0.5 else "th{border-bottom:2px solid}"
        head = "".join(f"<th>{e(head)}</th>" for head in ("", *made.heads))
        rows = "".join(
            f"<tr><td>{e(row)}</td>" + "".join(f"<td>{e(s)}</td>" for s in said) + "</tr>" for row, said in made.rows
        )
        return f"<style>{css}{border}</style><table><tr>{head}</tr>{rows}</table>"
    if kind == "letter":
        opening = rng.choice(("Hello,", "Good day,"))
        text = "".join(f"<p>The {label.lower()} is {said}.</p>" for label, said in lines)
        return f"<style>{css}</style><p>{opening}</p>{text}"
    if kind == "receipt":
        css += "p{display:flex;justify-content:space-between}p:last-child{border-top:1px dashed;font-weight:bold}"
        text = "".join(f"<p><span>{label}</span><span>{said}</span></p>" for label, said in lines)
        return f"<style>{css}</style><h1 style='text-align:center'>{made.title}</h1>{text}"
    if kind == "ticket":
        css += "main{display:grid;grid-template-columns:1fr 1fr;gap:.5em}b{display:block;font-weight:bold}"
        text = "".join(f"<div>{label}<b>{said}</b></div>" for label, said in lines[:4])
        return f"<style>{css}</style><main>{text}</main>"
    text = "".join(f"<tr><td>{label}:</td><td>{said}</td></tr>" for label, said in lines)
    if rng.random() < 0.5:
        text = "".join(f"<p><b>{label}:</b> {said}</p>" for label, said in lines)
        return f"<style>{css}</style><h1>{made.title}</h1>{text}"
    return f"<style>{css}td{{border-bottom:1px solid #999}}</style><h1>{made.title}</h1><table>{text}</table>"


def draw_html(made: Plan, kind: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "page.html")
        source.write_text(f"<!doctype html><meta charset=utf-8>{page_of_html(made, kind)}")
        subprocess.run(
            ["chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--force-device-scale-factor=1", f"--user-data-dir={folder}/profile",
             f"--window-size={made.width},{made.height}", f"--screenshot={path}", source.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def draw_typst(made: Plan, kind: str, path: Path) -> None:
    import typst  # type: ignore[import-not-found]

    rng = Random(made.look)
    family = rng.choice(("Libertinus Serif", "New Computer Modern", "DejaVu Sans Mono")[: 3 if made.width > 400 else 2])
    paper, ink = rng.choice((("ffffff", "000000"), ("ffffff", "000000"), ("fdf6e3", "222222"), ("1d2733", "eeeeee")))

    def q(text: str) -> str:
        return '"' + text.replace('"', '\\"') + '"'

    set_up = (f"#set page(width: {made.width}pt, height: {made.height}pt, margin: {made.em * 1.1:.1f}pt, "
              f'fill: rgb("{paper}"))\n'
              f'#set text(font: "{family}", size: {made.em * 0.95:.1f}pt, fill: rgb("{ink}"))\n'
              f'#set line(stroke: rgb("{ink}"))\n')  # fmt: skip
    if kind == "table":
        cells = [f"[*#{q(t)}*]" for t in ("", *made.heads)]
        cells += [f"[#{q(t)}]" for row, said in made.rows for t in (row, *said)]
        stroke = rng.choice((f'rgb("{ink}")', "none", f'(x: none, y: rgb("{ink}"))'))
        inset = f"{made.em * 0.3:.1f}pt"
        body = f"#table(columns: {len(made.heads) + 1}, stroke: {stroke}, inset: {inset}, {', '.join(cells)})"
    elif kind == "receipt":
        rows = "".join(f"#{q(label)} #h(1fr) #{q(said)} \\\n" for label, said in made.lines)
        body = f"#align(center)[*{made.title}*]\n#line(length: 100%)\n{rows}"
    elif kind == "letter":
        body = "".join(f"#{q(f'The {label.lower()} is {said}.')} \\\n" for label, said in made.lines)
    else:
        cells = [f"[#{q(t)}]" for label, said in made.lines for t in (label + ":", said)]
        grid = f"#grid(columns: 2, column-gutter: 1em, row-gutter: 0.8em, {', '.join(cells)})"
        dotted = "".join(f"*#{q(label)}* #box(width: 1fr, repeat[.]) #{q(said)} \\\n" for label, said in made.lines)
        body = f"= {made.title}\n#v(0.3em)\n{grid}" if rng.random() < 0.6 else dotted
    path.write_bytes(typst.compile((set_up + body).encode(), format="png", ppi=72.0))


def draw_plot(made: Plan, kind: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rng = Random(made.look)
    family = rng.choice(("STIXGeneral", "DejaVu Serif", "DejaVu Sans"))
    points = made.em  # at 72 dots per inch a point is a pixel
    figure = pyplot.figure(figsize=(made.width / 72, made.height / 72), dpi=72)
    text: dict[str, Any] = {"fontsize": points, "family": family}
    if kind == "table":
        axes = figure.add_axes((0.04, 0.04, 0.92, 0.92))
        axes.axis("off")
        table = axes.table(
            [[row, *said] for row, said in made.rows], colLabels=["", *made.heads], loc="upper center", cellLoc="left"
        )
        table.auto_set_font_size(False)
        for cell in table.get_celld().values():
            cell.set_text_props(**text)
            cell.set_height(points * 1.7 / made.height)
    elif kind == "marks":
        axes = figure.add_axes((0.08, 0.08, 0.86, 0.86))
        count = len(made.marks)
        tall = made.height > made.width * 1.5
        for i, (shape, above, below) in enumerate(made.marks):
            along, across = (i + 0.5) / count, 0.5 if min(made.width, made.height) < 300 else 0.3 + 0.4 * (i % 2)
            x, y = (across, along) if tall else (along, across)
            marker = {"square": "s", "circle": "o", "triangle": "^", "star": "*"}[shape]
            side = points * (1.4 if shape == "star" else 1.0)
            axes.plot([x], [y], marker=marker, markersize=side, color=rng.choice(("k", "tab:blue", "tab:red")))
            for said, away, anchor in ((above, 1, "bottom"), (below, -1, "top")):
                axes.annotate(
                    said, (x, y), (0, away * points * 0.85), textcoords="offset points", ha="center", va=anchor, **text
                )
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    else:
        step = min(1.9 * points / made.height, 0.9 / (len(made.lines) + 1))
        figure.text(0.06, 0.97 - step, made.title, **{**text, "fontsize": points * 1.2})
        apart = rng.random() < 0.5
        for i, (label, said) in enumerate(made.lines, 2):
            y = 0.97 - step * i
            figure.text(0.06, y, f"{label}:" if apart else f"{label}: {said}", **text)
            if apart:
                figure.text(0.94, y, said, ha="right", **text)
    figure.savefig(path)
    pyplot.close(figure)


MAKERS: tuple[tuple[str, int, tuple[str, ...], Callable[[Plan, str, Path], None]], ...] = (
    ("html", 40, ("form", "table", "receipt", "ticket", "letter"), draw_html),
    ("typst", 30, ("form", "table", "receipt", "letter"), draw_typst),
    ("plot", 30, ("table", "form", "marks"), draw_plot),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.foreign.make", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write pictures and labels.json to")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rng, pages = Random(SEED), []
    for maker, count, kinds, draw in MAKERS:
        for i in range(count):
            kind = kinds[i % len(kinds)]
            made = plan(rng, kind, 4 if kind == "ticket" else 7)
            if i % ABSENT_EVERY == 0 and kind != "marks":
                ask_absent(rng, made)
            path = options.out / f"{maker}-{i:02d}.png"
            draw(made, kind, path)
            colors = 16 if maker != "plot" else 32
            with Image.open(path) as drawn:
                small = drawn.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
            small.save(path, optimize=True)
            pages.append({"picture": path.name, "questions": made.questions})
    entries = ",\n".join(" " + json.dumps(page) for page in pages)
    (options.out / "labels.json").write_text(f"[\n{entries}\n]\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

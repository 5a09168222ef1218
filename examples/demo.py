"""Asks the shipped model about the pictures in this folder and prints each answer beside what is written there.

    python examples/demo.py [--out FOLDER] [--model PATH] [--backend NAME]

The pictures were made by other means than the generator the model learned from; README.md beside this file says how.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

from fila import inference, visualize
from fila.images import read_picture

FOLDER = Path(__file__).resolve().parent


class Question(NamedTuple):
    """A question about a picture, and the answer that a reader of the picture would give."""

    picture: str
    text: str
    expected: str


QUESTIONS = (
    Question("receipt.png", "What is the total?", "$18.31"),
    Question("receipt.png", "What is the date?", "14 Mar 2026"),
    Question("chart.png", "What is above the square?", "Lungo"),
    Question("chart.png", "What is below the triangle?", "64"),
    Question("scan.jpg", "What is the invoice number?", "88213"),
    Question("scan.jpg", "What is the amount due?", "940.50"),
    Question("ticket.png", "What is the seat?", "14C"),
    Question("ticket.png", "When does it depart?", "09:35"),
    Question("prices.png", "What is the price of Mango?", "2.10"),
    Question("letter.png", "Who is the letter to?", "Selma"),
)
HEADINGS = ("picture", "question", "answer", "expected", "right", "encode s", "total s")


def main(arguments: list[str] | None = None) -> int:
    """Asks everything, prints a table, and writes an explaining picture for each question."""
    try:
        return _run(arguments)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if sys.stderr is not None:
            print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "out", help="folder for the explaining pictures")
    parser.add_argument("--model", help="checkpoint folder (default: the shipped fila-nano)")
    parser.add_argument("--backend", help="backend of the fusion (default: the best that runs)")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    model, processor = inference.load(options.model, backend=options.backend)
    options.out.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.1f} million parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}, "
        f"loaded in {time.perf_counter() - start:.1f} s\n"
    )

    rows, right, backend = [], 0, {}
    for number, (picture, question, expected) in enumerate(QUESTIONS, 1):
        read = read_picture(FOLDER / picture, name=picture)
        with visualize.watch_gates(model) as gates:
            said = inference.answer(model, processor, read, question)
        layout = read.layout(processor.image_processor.geometry)
        drawn = visualize.draw(read.image, layout, question, said.text, gates)
        visualize.save(drawn, options.out / f"{number}-{Path(picture).stem}.png")
        right += said.text == expected
        backend = said.backend
        rows.append(
            (picture, question, said.text, expected, "yes" if said.text == expected else "no",
             f"{said.seconds['encode']:.2f}", f"{sum(said.seconds.values()):.2f}")
        )  # fmt: skip

    widths = [max(len(row[i]) for row in (HEADINGS, *rows)) for i in range(len(HEADINGS))]
    for row in (HEADINGS, tuple("-" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nbackend: {backend['choice']} ({backend['why']})")
    print(f"explaining pictures: {options.out}")
    print(f"{right} of {len(QUESTIONS)} answered right")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures how much of a step is padding, on a simulated mixture with the sizes of LLaVA-NeXT's data.

    python -m bench.packing [--records 20000] [--seed 0]

Nothing is drawn or trained: a record is its picture's size and its number of text tokens, and the canvases, views and
image tokens are the 8B preset's. The four groups and their sizes are those of LLaVA-1.6's model card; how the academic
group divides, the pictures' sizes (those usual in the data sets named) and the lengths of texts are our assumptions.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fila.configuration import preset
from fila.geometry import Geometry
from fila.training.data.check import pack_lengths

Size = tuple[int, int]


def around(*sizes: Size, spread: float = 0.15) -> Callable[[random.Random], Size]:
    """One of some sizes (height, width), each side off by up to `spread`."""

    def draw(rng: random.Random) -> Size:
        height, width = rng.choice(sizes)
        return tuple(max(32, round(side * rng.uniform(1 - spread, 1 + spread))) for side in (height, width))  # type: ignore[return-value]

    return draw


COCO = around((480, 640), (480, 640), (640, 480), spread=0.1)
# Thousands of records, the picture, and the median of the text's tokens (log-normal, sigma 0.6).
MIXTURE: dict[str, tuple[float, Callable[[random.Random], Size] | None, int]] = {
    "GPT-generated conversations on COCO": (158, COCO, 400),
    "academic, COCO (VQAv2, OKVQA, A-OKVQA, RefCOCO)": (190, COCO, 120),
    "academic, GQA and Visual Genome": (158, around((375, 500), (500, 375)), 250),
    "academic, OCR-VQA's book covers": (80, around((500, 330)), 150),
    "academic, documents and charts": (72, around((2200, 1700), (560, 850), (448, 448)), 120),
    "GPT-4V mixture": (50, around((768, 1024), (1024, 768), (1080, 1920)), 350),
    "ShareGPT, text alone": (40, None, 1100),
}
TEXT_LIMIT = 2048  # tokens; LLaVA's training cuts conversations there


@dataclass
class Simulated:
    tokens: int
    views: int


def simulate(count: int, seed: int, geometry: Geometry) -> Iterator[Simulated]:
    """Records of the mixture in random order."""
    rng = random.Random(seed)
    groups = list(MIXTURE.values())
    for _ in range(count):
        _, picture, median = rng.choices(groups, [group[0] for group in groups])[0]
        text = min(TEXT_LIMIT, max(20, round(rng.lognormvariate(0, 0.6) * median)))
        layout = geometry.layout(*picture(rng)) if picture else None
        yield Simulated(text + (layout.num_tokens if layout else 0), layout.num_views if layout else 0)


def padded(records: list[Simulated], batch: int) -> tuple[float, float]:
    """Shares of padding among the tokens and among the tiles of batches padded to their largest record."""
    tokens = tiles = room = places = 0
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        tokens += sum(record.tokens for record in part)
        room += len(part) * max(record.tokens for record in part)
        pictured = [record.views for record in part if record.views]
        tiles += sum(pictured)
        places += len(pictured) * max(pictured, default=0)
    return 1 - tokens / room, 1 - tiles / places


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    geometry = preset("fila-llama3-8b").vision_config.geometry()
    records = list(simulate(options.records, options.seed, geometry))
    lengths = [record.tokens for record in records]
    mean = sum(lengths) / len(lengths)
    print(f"{len(records)} records, {mean:.0f} tokens on average, at most {max(lengths)}")
    print("| how | rows | padded tokens | padded tiles |\n| --- | ---: | ---: | ---: |")
    for batch in (4, 16):
        tokens, tiles = padded(records, batch)
        print(f"| batches of {batch}, padded | {len(records)} | {tokens:.1%} | {tiles:.1%} |")
    for room in (4096, 8192, 16384):
        usable = [length for length in lengths if length <= room]
        rows = list(pack_lengths(usable, room))
        free = 1 - sum(rows) / (len(rows) * room)
        left = f", {len(lengths) - len(usable)} records too long" if len(usable) < len(lengths) else ""
        print(f"| packed into {room}{left} | {len(rows)} | {free:.2%} | 0 |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

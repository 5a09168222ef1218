"""Reads a corpus once, to the last pixel, and reports what a run would find."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from fila.geometry import Geometry
from fila.training.data.conversation import IGNORE, Encoder
from fila.training.data.packing import POOL, choose
from fila.training.data.sources import Source, fingerprint, open_source
from fila.training.errors import RecordError

SHOWN = 12  # sample pictures, and faults of a kind
CENTILES = (0, 50, 95, 100)
CELL = 240  # pixels of a sample picture's longer side


@dataclass
class Finding:
    """What one record is; `fault` is its kind and message where it cannot be used."""

    name: str
    tokens: int = 0
    learned: int = 0
    turns: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # of the record, then of its pictures
    fault: tuple[str, str] | None = None


class _Records(Dataset):
    def __init__(self, source: Source, encoder: Encoder):
        self.source, self.encoder = source, encoder

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Finding:
        try:
            record = self.source.record(index)
            encoded = self.encoder.encode(record)
            contents = [picture.bytes() for picture in record.pictures]
            for picture in record.pictures:
                picture.read()
        except RecordError as error:
            return Finding(f"record {index}", fault=(error.kind, str(error)))
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        whole = hashlib.sha256(json.dumps([record.messages, digests]).encode()).hexdigest()
        learned = int((encoded.labels != IGNORE).sum())
        return Finding(record.name, len(encoded), learned, len(record.messages), encoded.sizes, [whole, *digests])


@dataclass
class Report:
    """What a corpus holds; counts are of records unless named otherwise.

    Attributes:
        sizes: of the pictures' height and width, smallest, median and largest.
        tokens: per record, smallest, median, 95th percentile and largest; `learned` of the answers alone.
        canvases: pictures by canvas, height x width.
        faults: number of broken records by kind, and the first messages of each.
        repeated_records, repeated_pictures: those that came before, byte for byte.
        rows, padding: rows of `length` tokens that packing makes of one epoch, and the share of them that stays free.
    """

    path: str
    records: int
    usable: int
    text_only: int
    pictures: int
    views: int
    sizes: dict[str, list[int]]
    tokens: list[int]
    learned: list[int]
    turns: list[int]
    canvases: dict[str, int]
    faults: dict[str, int]
    messages: dict[str, list[str]]
    repeated_records: int
    repeated_pictures: int
    length: int
    rows: int
    padding: float
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_corpus(
    path: Path, processor: Any, length: int, images: Path | None = None, workers: int = 0
) -> tuple[Report, list[tuple[str, Any]]]:
    """The report of a corpus, and sample pictures from all over it, by name."""
    source = open_source(path, images)
    encoder = Encoder(processor)
    loader = DataLoader(_Records(source, encoder), batch_size=None, num_workers=workers, collate_fn=lambda x: x)
    good: list[Finding] = []
    faults: Counter[str] = Counter()
    messages: dict[str, list[str]] = {}
    for found in loader:
        if found.fault is None and found.tokens > length:
            found.fault = "too long", f"{found.name}: expected at most {length} tokens, got {found.tokens}"
        if found.fault is None:
            good.append(found)
            continue
        kind, message = found.fault
        faults[kind] += 1
        if faults[kind] <= SHOWN:
            messages.setdefault(kind, []).append(message)
    sizes = [size for found in good for size in found.sizes]
    layouts = [encoder.geometry.layout(*size) for size in sizes]
    rows = list(pack_lengths([found.tokens for found in good], length))
    pictures = [digest for found in good for digest in found.digests[1:]]
    records = [found.digests[0] for found in good]
    report = Report(
        str(path), len(source), len(good), sum(not found.sizes for found in good), len(sizes),
        sum(layout.num_views for layout in layouts),
        {name: _spread([size[axis] for size in sizes], (0, 50, 100)) for axis, name in enumerate(("height", "width"))},
        _spread([found.tokens for found in good], CENTILES), _spread([found.learned for found in good], CENTILES),
        _spread([found.turns for found in good], CENTILES),
        dict(Counter(f"{layout.canvas[0]}x{layout.canvas[1]}" for layout in layouts).most_common()),
        dict(faults), messages, len(records) - len(set(records)), len(pictures) - len(set(pictures)),
        length, len(rows), 1 - sum(rows) / (len(rows) * length) if rows else 0.0, fingerprint(source),
    )  # fmt: skip
    return report, _samples(source)


def _spread(numbers: Sequence[int], percentiles: Sequence[int]) -> list[int]:
    return [round(float(np.percentile(numbers, p))) for p in percentiles] if numbers else []


def pack_lengths(lengths: Sequence[int], room: int) -> Iterator[int]:
    """How full rows of `room` tokens get when they are chosen from records of these lengths, in their order."""
    pool: list[int] = []
    for length in lengths:
        pool.append(length)
        if len(pool) < POOL:
            continue
        yield _take(pool, room)
    while pool:
        yield _take(pool, room)


def _take(pool: list[int], room: int) -> int:
    chosen = choose(pool, room)
    total = sum(pool[i] for i in chosen)
    for i in reversed(chosen):
        del pool[i]
    return total


def _samples(source: Source) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    step = max(1, len(source) // (4 * SHOWN))
    for index in range(0, len(source), step):
        try:
            record = source.record(index)
            found += [(record.name, picture.read().image) for picture in record.pictures]
        except RecordError:
            continue
        if len(found) >= SHOWN:
            break
    return found[:SHOWN]


def draw_samples(samples: Sequence[tuple[str, Any]], geometry: Geometry) -> Image.Image:
    """The sample pictures on their canvases, seams between tiles drawn in, four a row."""
    columns = 4
    rows = max(1, -(-len(samples) // columns))
    sheet = Image.new("RGB", (columns * (CELL + 10) + 10, rows * (CELL + 30) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(samples):
        layout = geometry.layout(image.height, image.width)
        scale = CELL / max(layout.canvas)
        x, y = 10 + i % columns * (CELL + 10), 10 + i // columns * (CELL + 30)
        content = layout.content.scaled(scale, scale).rounded()
        canvas = Image.new("RGB", (round(layout.canvas[1] * scale), round(layout.canvas[0] * scale)), "#d0d0d0")
        size = max(1, int(content.width)), max(1, int(content.height))
        canvas.paste(image.resize(size), (int(content.x0), int(content.y0)))
        sheet.paste(canvas, (x, y))
        for tile in layout.tiles:
            draw.rectangle(
                [x + tile.x0 * scale, y + tile.y0 * scale, x + tile.x1 * scale, y + tile.y1 * scale], outline="#d02020"
            )
        words = f"{name[-24:]}  {image.height}x{image.width}  {layout.num_tokens} tokens"
        draw.text((x, y + CELL + 4), words.encode("ascii", "replace").decode(), fill="black")
    return sheet


def format_report(report: Report) -> str:
    """The report as lines of text."""
    lines = [
        f"{report.path}: {report.records} records, {report.usable} usable, {report.text_only} without a picture",
        f"pictures   {report.pictures}, {report.views} views; canvases "
        + (", ".join(f"{name}: {count}" for name, count in report.canvases.items()) or "none"),
    ]
    lines += [
        f"{name:<10} {' / '.join(map(str, numbers))} pixels (smallest, median, largest)"
        for name, numbers in report.sizes.items()
        if numbers
    ]
    lines += [
        f"{name:<10} {' / '.join(map(str, numbers))} per record (smallest, median, 95 %, largest)"
        for name, numbers in (("tokens", report.tokens), ("learned", report.learned), ("turns", report.turns))
        if numbers
    ]
    lines += [
        f"repeated   {report.repeated_records} records, {report.repeated_pictures} pictures",
        f"packing    {report.rows} rows of {report.length} tokens an epoch, {report.padding:.1%} of them free",
        f"data       {report.fingerprint}",
    ]
    for kind, count in report.faults.items():
        lines.append(f"broken     {count}: {kind}")
        lines += [f"           {message}" for message in report.messages[kind]]
    return "\n".join(lines)

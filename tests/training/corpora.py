"""Writes small corpora of every format, with pictures of many sizes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(60, 100), (100, 60), (90, 90), (40, 130), (130, 40), (200, 200)]


def picture(seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    height, width = size or SIZES[seed % len(SIZES)]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def turns(i: int, with_picture: bool = True) -> list[dict]:
    """A conversation of one or two questions; a third of them long."""
    start = "<image>\n" if with_picture else ""
    found = [
        {"from": "human", "value": f"{start}What is number {i}?"},
        {"from": "gpt", "value": f"{i} " * (1 + i % 3 * 8)},
    ]
    if i % 2:
        found += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    return found


def write_llava(folder: Path, count: int = 12, lines: bool = False, text_every: int = 4) -> Path:
    """Every `text_every`-th record is text alone; 0 for none."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        with_picture = not text_every or i % text_every != 3
        record = {"id": str(i), "conversations": turns(i, with_picture)}
        if with_picture:
            name = f"pictures/{i}.png"
            (folder / name).write_bytes(png(i))
            record["image"] = name
        records.append(record)
    path = folder / ("pages.jsonl" if lines else "pages.json")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1))
    return path


def write_tars(folder: Path, count: int = 12, tars: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(tars):
        with tarfile.open(folder / f"{t:03}.tar", "w") as tar:
            for i in range(t, count, tars):
                for name, data in (
                    (f"{i:04}.jpg" if i % 2 else f"{i:04}.0.png", png(i)),
                    (f"{i:04}.json", json.dumps({"conversations": turns(i)}).encode()),
                ):
                    info = tarfile.TarInfo(f"shard/{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder: Path, count: int = 12, group: int = 5) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What {i}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(i)}]},
            ],
            "images": [{"bytes": png(i), "path": None}],
        }
        for i in range(count)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=group)
    return folder

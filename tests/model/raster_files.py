"""Picture files written from sample values, bit by bit, so that a test knows the right pixel without asking Pillow."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np


def packed(rows: Sequence[Sequence[int]], depth: int, order: str = ">") -> list[bytes]:
    """Each row's samples of `depth` bits, first sample in the highest bits, filled up to whole bytes."""
    if depth in (8, 16, 32):
        return [np.asarray(row, f"{order}u{depth // 8}").tobytes() for row in rows]
    out = []
    for row in rows:
        bits = "".join(format(value, f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        out.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return out


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: Sequence[Sequence[int]], depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG. Colour: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA; a row holds each pixel's samples in turn."""
    width = len(rows[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    data = b"".join(b"\0" + row for row in packed(rows, depth))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def tiff(
    rows: Sequence[Sequence[int]],
    depth: int,
    photometric: int | None,
    *,
    samples: int = 1,
    order: str = "<",
    deflate: bool = False,
    tags: Sequence[tuple[int, int, Sequence[int]]] = (),
) -> bytes:
    """A TIFF of one strip. Photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 Lab.

    `tags` are further entries (or others in place of ours), each (number, type, values): type 3 is 16 bits, 4 is 32.
    """
    data = b"".join(packed(rows, depth, order))
    data = zlib.compress(data) if deflate else data
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (3, [len(rows[0]) // samples]),
        257: (3, [len(rows)]),
        258: (3, [depth] * samples),
        259: (3, [8 if deflate else 1]),
        **({} if photometric is None else {262: (3, [photometric])}),
        273: (4, [8]),
        277: (3, [samples]),
        278: (3, [len(rows)]),
        279: (4, [len(data)]),
    }
    entries |= {number: (kind, values) for number, kind, values in tags}
    body = data + b"\0" * (len(data) % 2)
    directory = struct.pack(f"{order}H", len(entries))
    directory_end = 8 + len(body) + 2 + 12 * len(entries) + 4
    far = b""
    for number, (kind, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(content) > 4:
            place = struct.pack(f"{order}I", directory_end + len(far))
            far += content + b"\0" * (len(content) % 2)
        else:
            place = content.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", number, kind, len(values)) + place
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}I", 8 + len(body)) + body + directory + b"\0" * 4 + far


def pnm(rows: Sequence[Sequence[int]], maximum: int, samples: int = 1, plain: bool = False) -> bytes:
    """A PGM (one sample) or PPM (three), binary or `plain` text."""
    kind = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[samples, plain]
    head = f"P{kind}\n{len(rows[0]) // samples} {len(rows)}\n{maximum}\n".encode()
    if plain:
        return head + "\n".join(" ".join(map(str, row)) for row in rows).encode() + b"\n"
    return head + np.asarray(rows, ">u1" if maximum < 256 else ">u2").tobytes()

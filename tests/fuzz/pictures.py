"""Throws mutated picture files at `fila.images.read_picture`: `python -m tests.fuzz.pictures [COUNT [SEED]]`.

Each file is read or refused with an `ImageError`; anything else is a failure, and so is a file that takes more than
`MOST_SECONDS`, one that reads differently as bytes and as a Pillow image, or one whose reading depends on what another
library has set on Pillow. Files that stay whole must show the right pixels. The seed is printed and makes a run
repeatable; the file at hand stays in the folder that is printed, should the process die of it.
"""

import faulthandler
import io
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from fila.images import ImageError, read_picture
from tests.model.raster_files import png, png_chunk, pnm, tiff

MOST_SECONDS = 10.0  # of the processor's time, for one reading
MOST_PEAK_BYTES = 3 << 30  # a bomb within the limits is a picture of 10,000 x 10,000: 400 MB, converted and copied
HEIGHT, WIDTH = 21, 34
BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera held that way stores an upright picture
EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

Expected = np.ndarray | None


def upright() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seeds() -> list[tuple[str, bytes, Expected]]:
    """Whole files: name, bytes, and the right pixels where the format keeps them."""
    pixels = upright()
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    frames = {"save_all": True, "append_images": [Image.new("RGB", image.size, "red"), image.rotate(180)]}
    sixteen = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    found: list[tuple[str, bytes, Expected]] = []

    def add(name: str, picture: Image.Image, kind: str, expected: Expected = None, **options: object) -> None:
        found.append((name, encoded(picture, kind, **options), expected))

    greys = np.repeat(pixels[..., :1], 3, axis=2)
    for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000"):
        add(kind, image, kind, pixels)
        add(f"{kind} grey", grey, kind, greys)
    add("PNG 16 bits", sixteen, "PNG", greys)
    add("TIFF 16 bits", sixteen, "TIFF", greys)
    add("PPM 16 bits", sixteen, "PPM", greys)
    add("WEBP lossless", image, "WEBP", pixels, lossless=True)
    for kind in ("JPEG", "WEBP", "AVIF", "GIF"):
        add(kind, image, kind)
    add("JPEG progressive", image, "JPEG", progressive=True)
    add("JPEG CMYK", image.convert("CMYK"), "JPEG")
    add("TIFF CMYK", image.convert("CMYK"), "TIFF")
    add("TIFF YCbCr", image.convert("YCbCr"), "TIFF")
    add("PNG palette", image.quantize(7), "PNG", transparency=3)
    add("PNG one bit", image.convert("1"), "PNG", transparency=0)
    add("PNG alpha", image.convert("RGBA"), "PNG", pixels)
    add("PNG metadata", image, "PNG", pixels, icc_profile=b"x" * 500, dpi=(72, 72))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        expected = pixels if compression != "jpeg" else None
        add(f"TIFF {compression}", image, "TIFF", expected, compression=compression)
    add("TIFF fax", image.convert("1"), "TIFF", compression="group4")
    for kind in ("PNG", "GIF", "WEBP", "TIFF", "MPO", "AVIF"):
        add(f"{kind} frames", image, kind, pixels if kind in ("PNG", "TIFF") else None, **frames)
    add("JPEG2000 bare", image, "JPEG2000", pixels, no_jp2=True)
    add("JPEG2000 tiles", image, "JPEG2000", None, tile_size=(16, 16), irreversible=True)
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        exif[0x010E] = "a picture"
        stored = image.transpose(Image.Transpose(BACK[turn]))
        for kind in ("PNG", "TIFF"):
            add(f"{kind} turned {turn}", stored, kind, pixels, exif=exif)
        add(f"JPEG turned {turn}", stored, "JPEG", exif=exif)
        add(f"WEBP turned {turn}", stored, "WEBP", pixels, exif=exif, lossless=True)
    return found


# --- bombs: small files that ask for much


def png_of(*chunks: tuple[bytes, bytes], width: int = 8, height: int = 8, depth: int = 8, colour: int = 2) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in (head, *chunks, (b"IEND", b"")))


def zeros(count: int) -> bytes:
    """`count` zeros, deflated, without ever holding them."""
    deflate = zlib.compressobj(9)
    parts = [deflate.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)]
    return b"".join([*parts, deflate.flush()])


def bombs(draw: random.Random) -> list[tuple[str, Callable[[], bytes]]]:
    """Name and maker of each; sizes are drawn, so that no two runs throw the same."""
    pixels = (b"IDAT", zlib.compress(b"\0" * 25 * 8))
    image = Image.fromarray(upright())
    side, many = draw.randrange(2_000, 10_000), draw.randrange(2_000, 20_000)
    huge = draw.choice((10_001, 65_535, 1 << 30, (1 << 31) - 1))

    def gif(count: int) -> bytes:
        data = encoded(image, "GIF")
        return data[:-1] + (b"!\xfe" + b"\x05hello\0") * count + data[-1:]

    def tiff_of_tags(count: int) -> bytes:
        data = bytearray(encoded(image, "TIFF")) + bytes(200_000)
        (start,) = struct.unpack("<I", data[4:8])
        (own,) = struct.unpack("<H", data[start : start + 2])
        entries = data[start + 2 : start + 2 + 12 * own]
        entries += b"".join(struct.pack("<HHII", 40_000 + i, 1, 200_000, 8) for i in range(count))
        data[4:8] = struct.pack("<I", len(data))
        return bytes(data + struct.pack("<H", own + count) + entries + bytes(4))

    def jpeg_of_scans(count: int) -> bytes:
        data = encoded(Image.new("RGB", (1_500, 1_500)), "JPEG", progressive=True)
        start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
        return data[:end] + data[start:end] * count + data[end:]

    def jpeg_of_segments(kind: bytes, count: int) -> bytes:
        data = encoded(image, "JPEG")
        return data[:2] + (b"\xff" + kind + struct.pack(">H", 12) + b"Exif\0\0II*\0") * count + data[2:]

    def patched(kind: str, find: bytes, behind: int, value: bytes) -> bytes:
        data = bytearray(encoded(image, kind))
        at = data.index(find) + behind
        data[at : at + len(value)] = value
        return bytes(data)

    side_bytes = struct.pack(">II", huge, huge)
    tag = struct.pack("<HHI", 0x0112, 2, 255)
    turns = [image.rotate(angle) for angle in range(50)]
    return [
        ("PNG, large and empty", lambda: png_of((b"IDAT", zeros((3 * side + 1) * side)), width=side, height=side)),
        ("PNG, too large", lambda: png_of(pixels, width=huge, height=huge)),
        ("PNG, one row of many", lambda: png_of((b"IDAT", zeros(3 * side)), width=side, height=side)),
        ("PNG, zTXt", lambda: png_of((b"zTXt", b"a\0\0" + zeros(side << 12)), pixels)),
        ("PNG, iTXt", lambda: png_of((b"iTXt", b"a\0\1\0\0\0" + zeros(side << 12)), pixels)),
        ("PNG, iCCP", lambda: png_of((b"iCCP", b"a\0\0" + zeros(side << 12)), pixels)),
        ("PNG, many texts", lambda: png_of(*[(b"tEXt", b"a\0b")] * many, pixels)),
        ("PNG, unknown chunks", lambda: png_of(*[(b"abCd", b"x")] * many, pixels)),
        ("PNG, frames", lambda: png_of((b"acTL", struct.pack(">II", huge, 0)), pixels)),
        ("PNG, Exif", lambda: png_of((b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + tag * many), pixels)),
        ("GIF, comments", lambda: gif(many)),
        ("GIF, frames", lambda: encoded(image, "GIF", save_all=True, append_images=turns)),
        ("GIF, frame beyond", lambda: patched("GIF", b",", 5, b"\xff\xff\xff\xff")),
        ("TIFF, tags", lambda: tiff_of_tags(draw.randrange(100, 4_000))),
        ("TIFF, too large", lambda: tiff([[0] * 8], 8, 1, tags=[(256, 4, [huge]), (257, 4, [huge])])),
        ("TIFF, strips", lambda: tiff([[0] * 8], 8, 1, tags=[(257, 3, [side]), (278, 3, [1]), (273, 4, [8] * side)])),
        ("JPEG, scans", lambda: jpeg_of_scans(draw.randrange(0, 400))),
        ("JPEG, Exif", lambda: jpeg_of_segments(b"\xe1", many)),
        ("JPEG, comments", lambda: jpeg_of_segments(b"\xfe", many)),
        ("JPEG, too large", lambda: patched("JPEG", b"\xff\xc0", 5, b"\xff\xff\xff\xff")),
        ("JPEG2000, too large", lambda: patched("JPEG2000", b"ihdr", 4, side_bytes)),
        ("JPEG2000, tiles of one pixel", lambda: patched("JPEG2000", b"\xff\x51", 22, struct.pack(">II", 1, 1))),
        ("JPEG2000, code stream too large", lambda: patched("JPEG2000", b"\xff\x51", 6, side_bytes)),
        ("WEBP, too large", lambda: patched("WEBP", b"VP8", 11, b"\xff\x3f\xff\x3f")),
        ("PPM, too large", lambda: b"P6 %d %d 255\n" % (huge, huge)),
        ("PPM, plain", lambda: b"P3 %d %d 255\n" % (side, side) + b"1 " * many),
        ("PPM, token", lambda: b"P2 4 4 " + b"9" * (many << 6)),
        ("BMP, too large", lambda: patched("BMP", b"BM", 18, struct.pack("<ii", huge & 0x7FFFFFFF, -1))),
    ]  # fmt: skip


# --- mutations


def mutated(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """One to four changes of the kinds that find faults in decoders."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not out:
            break
        # Headers decide most; a third of the changes are there.
        at = draw.randrange(min(len(out), draw.choice((64, 300, len(out)))))
        change = draw.randrange(9)
        if change == 0:
            out[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            out[at] = draw.randrange(256)
        elif change in (2, 3):
            layout = draw.choice((">H", "<H", ">I", "<I"))
            size = struct.calcsize(layout)
            out[at : at + size] = struct.pack(layout, draw.choice(EXTREMES) & (1 << 8 * size) - 1)
        elif change == 4:
            del out[at:]
        elif change == 5:
            del out[at : at + draw.choice((1, 2, 4, 30))]
        elif change == 6:
            out[at:at] = out[at : at + draw.choice((1, 8, 100))] * draw.choice((1, 2, 50))
        elif change == 7:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 20))))
        else:
            cut = draw.randrange(len(other))
            out[at:] = other[cut:]
    return with_checksums(bytes(out)) if draw.random() < 0.5 else bytes(out)


def with_checksums(data: bytes) -> bytes:
    """A PNG with the right checksum behind each chunk, so that what is wrong in it reaches the decoder."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        parts.append(png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join([*parts, data[at:]])


def samples(draw: random.Random) -> tuple[str, bytes, Expected]:
    """A whole file of one row, of a drawn depth and format, with its right pixels."""
    kind = draw.choice(("png", "tiff", "pnm"))
    depth = draw.choice((1, 2, 4, 8, 16) if kind == "png" else (1, 2, 4, 8, 12, 16))
    full = draw.randrange(1, 1 << 16) if kind == "pnm" else (1 << depth) - 1
    values = [full, *(draw.randrange(full + 1) for _ in range(draw.randrange(12)))]
    eight = np.array([round(value * 255 / full) for value in values])
    if kind == "pnm":
        data = pnm([values], full, plain=draw.random() < 0.5)
    elif kind == "png":
        key = draw.choice(values)
        data = png([values], depth, 0, (b"tRNS", struct.pack(">H", key)))
        eight = np.where(np.array(values) == key, 255, eight)
    else:
        photometric = draw.choice((0, 1))
        data = tiff([values], depth, photometric, order=draw.choice("<>"), deflate=draw.random() < 0.5)
        eight = eight if photometric else 255 - eight
    return f"{kind} of {depth} bits or up to {full}", data, np.repeat(eight[None, :, None], 3, axis=2)


# --- the judge


def outcome(source: object) -> np.ndarray | str:
    """The pixels, or "refused"."""
    try:
        picture = read_picture(source)  # type: ignore[arg-type]
    except ImageError:
        return "refused"
    assert picture.image.mode == "RGB", picture.image.mode
    return np.array(picture.image)


def judge(draw: random.Random, data: bytes, expected: Expected) -> str:
    """ "read" or "refused".

    Raises:
        AssertionError: a wrong picture, or one that depends on how it came. Whatever else `read_picture` raises.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = lenient = draw.random() < 0.5
    started = time.process_time()
    got = outcome(data)
    seconds = time.process_time() - started
    assert seconds <= MOST_SECONDS, f"took {seconds:.1f} s"
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
    if expected is not None and not isinstance(got, str):
        assert got.shape == expected.shape, f"{got.shape} instead of {expected.shape}"
        worst = np.abs(got.astype(int) - expected).max()
        assert worst <= 1, f"{worst} levels off"
    if len(data) < 100_000 and draw.random() < 0.2:
        ImageFile.LOAD_TRUNCATED_IMAGES = not lenient
        assert np.array_equal(got, outcome(io.BytesIO(data))), "depends on a setting of Pillow"
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            opened = Image.open(io.BytesIO(data))
        except Exception:
            opened = None
        if opened is not None and opened.format != "MPO":
            again = outcome(opened)
            assert np.array_equal(got, again), f"as a Pillow image of {opened.format} it reads differently"
    return "refused" if isinstance(got, str) else "read"


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """`count` files; how many were read and refused, of whole, mutated and bomb files.

    Raises:
        AssertionError: with the number and name of the file that failed, which stays in `folder`.
    """
    draw = random.Random(seed)
    whole = seeds()
    found: Counter[str] = Counter()
    path = folder / "picture"
    with path.open("wb", buffering=0) as kept:
        for number in range(count):
            group, expected = draw.choices(("mutated", "whole", "samples", "bombs"), (90, 4, 4, 2))[0], None
            name, data, right = draw.choice(whole)
            if group == "whole":
                expected = right
            elif group == "samples":
                name, data, expected = samples(draw)
            elif group == "bombs":
                name, make = draw.choice(bombs(draw))
                data = make()
            else:
                data = mutated(draw, data, draw.choice(whole)[1])
            if number % 100 == 0:
                faulthandler.dump_traceback_later(100 * MOST_SECONDS, exit=True)
            kept.seek(0)
            kept.truncate()
            kept.write(data)
            try:
                verdict = judge(draw, data, expected)
                if group == "whole" or (group == "samples" and name.startswith("png")):
                    assert verdict == "read", "a whole file was refused"
            except Exception as error:
                raise AssertionError(
                    f"file {number} of seed {seed} ({group}: {name}), kept as {path}: {type(error).__name__}: {error}"
                ) from error
            found[f"{group} {verdict}"] += 1
    faulthandler.cancel_dump_traceback_later()
    return found


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 10_000
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(1 << 32)
    folder = Path(tempfile.mkdtemp(prefix="fila-fuzz-"))
    print(f"pictures: {count} files, seed {seed}, the one at hand in {folder}", flush=True)
    faulthandler.enable()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fuzz(count, seed, folder)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    print(f"pictures: {dict(sorted(found.items()))}, {peak / 1e6:.0f} MB at most", flush=True)
    assert peak <= MOST_PEAK_BYTES, f"took {peak} bytes"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

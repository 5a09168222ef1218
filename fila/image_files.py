"""Opens picture files: finds the format, reads the header, and refuses files that are cut or would decode too slowly.

Pillow decodes, independent of what other code in the process has set on it (`trusting_no_settings`). Three formats are
walked first, without decoding anything:

    JPEG       scans, each of which costs a pass over all pixels, however few bytes it has
    JPEG 2000  tiles, since the decoder paints missing ones black and says nothing; and the depth of each component
    PNG        the transparent colour, in the units of the file (Pillow keeps it, but not the depth it belongs to)
"""

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from fila.errors import ImageError

# Rasters only. Pillow would also open PostScript (by running an interpreter on it) and dozens of formats nobody sends.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_FILE_BYTES = 1 << 30  # the largest picture, uncompressed, of 16 bits and with alpha, has 800 MB
# A progressive JPEG has some ten scans. At these limits decoding takes about four seconds (measured: 1.6 ns a pixel).
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 2 * 10**9
MAX_EXIF_SEGMENTS = 100  # Pillow joins them one by one

# The next marker, as libjpeg finds it: stuffed zeros, fill bytes and restarts are passed over.
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
JPEG_NO_LENGTH = (0x01, 0xD8)
JPEG_END, JPEG_SCAN, JPEG_APP1 = 0xD9, 0xDA, 0xE1
J2K_START, J2K_SIZE, J2K_TILE_PART, J2K_END = 0xFF4F, 0xFF51, 0xFF90, 0xFFD9
TILE_PART_HEADER = 14  # bytes from its marker to its data, at least

_settings_lock = threading.Lock()
_settings_users = 0
_settings_before: tuple[bool, int | None] = (False, None)


@contextmanager
def trusting_no_settings(max_side: int) -> Iterator[None]:
    """Pillow's process-wide settings, for as long as pictures of ours are decoded, at what they must be.

    `ImageFile.LOAD_TRUNCATED_IMAGES` would let cut files pass as grey areas, `Image.MAX_IMAGE_PIXELS` would refuse or
    warn below our own limit on the sides. Both are put back when the last of our threads is done.
    """
    global _settings_users, _settings_before
    with _settings_lock:
        if not _settings_users:
            _settings_before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, 0
        _settings_users += 1
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_side**2)
    try:
        yield
    finally:
        with _settings_lock:
            _settings_users -= 1
            if not _settings_users:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = _settings_before


def read_whole(pipe: IO[bytes], name: str) -> IO[bytes]:
    """A seekable copy of what a pipe holds, given up as soon as that can be no picture."""
    parts: list[bytes] = []
    size = 0
    while part := pipe.read(1 << 20):
        if not isinstance(part, bytes):
            raise TypeError(f"bytes expected, {type(part).__name__} read")
        parts.append(part)
        size += len(part)
        if len(parts) == 1 and size >= 32 and not any(_accepts(kind, part[:32]) for kind in FORMATS):
            break  # the caller says what is wrong with it
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{name}: expected at most {MAX_FILE_BYTES} bytes, got more")
    return io.BytesIO(b"".join(parts))


def open_file(file: IO[bytes], name: str, max_side: int) -> Image.Image:
    """The picture in a seekable file, header read, pixels not; sides and what the header promises are checked.

    Raises:
        ImageError: another format, a damaged header, sides over `max_side`, an incomplete or an endless code stream.
    """
    Image.init()
    try:
        if file.seek(0, io.SEEK_END) > MAX_FILE_BYTES:
            raise ImageError(f"{name}: expected at most {MAX_FILE_BYTES} bytes, got more")
        file.seek(0)
        prefix = file.read(32)
        # A function that reads a byte from it is not asked to read from a file that ends there.
        kinds = [kind for kind in FORMATS if len(prefix) > 1 and _accepts(kind, prefix)]
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: expected a picture, its header cannot be read: {error}") from error
    if not kinds:
        got = "something else" if prefix else "an empty file"
        raise ImageError(f"{name}: expected a picture ({', '.join(FORMATS)}), got {got}")
    try:
        file.seek(0)
        # The JPEG reader itself: the one registered also reads the further pictures that an MPO file lists.
        opener = JpegImagePlugin.JpegImageFile if kinds[0] == "JPEG" else Image.OPEN[kinds[0]][0]
        image = opener(file, "")
    except Exception as error:  # decoders raise nearly anything on damaged files
        if isinstance(error, Image.DecompressionBombError):
            raise ImageError(f"{name}: expected at most {max_side}x{max_side} pixels, got more: {error}") from error
        if kinds[0] == "TIFF" and (samples := _tiff_samples_in_words(file)):
            known = "grey of 1, 2, 4, 8, 12, 16 or 32 bits, colours of 8 or 16, or floats of 32"
            raise ImageError(f"{name}: expected a TIFF of {known}, got one of {samples}") from error
        raise ImageError(
            f"{name}: expected a picture, its header cannot be read as {kinds[0]}: {error or type(error).__name__}"
        ) from error
    check_size(image.height, image.width, max_side, name)
    return image


def _tiff_samples_in_words(file: IO[bytes]) -> str:
    """The samples of a TIFF for which Pillow has no mode; empty where the file does not say so much."""
    try:
        file.seek(0)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        kind = {2: "signed ", 3: "floating-point "}.get(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0], "")
        photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        return f"{len(bits)} {kind}samples of {max(bits)} bits, photometric interpretation {photometric}"
    except Exception:  # the directory is damaged
        return ""


def _accepts(kind: str, prefix: bytes) -> bool:
    accept = Image.OPEN[kind][1] if kind in Image.OPEN else None
    return accept is not None and accept(prefix) is True


def check_size(height: int, width: int, max_side: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: expected at least 1x1 pixels, got {height}x{width}")
    if height > max_side or width > max_side:
        raise ImageError(
            f"{name}: expected at most {max_side}x{max_side} pixels, got {height}x{width} (height x width)"
        )


def check_jpeg(file: IO[bytes], pixels: int) -> None:
    """Refuses a JPEG that a decoder would go over too often.

    Raises:
        ImageError: without a name.
    """
    file.seek(0)
    data = file.read()
    scans = exif = 0
    at = 0
    while found := JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == JPEG_END:
            break
        scans += marker == JPEG_SCAN
        exif += marker == JPEG_APP1 and data[at + 2 : at + 6] == b"Exif"
        if marker not in JPEG_NO_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
    if scans > most:
        raise ImageError(f"expected a JPEG of this size in at most {most} scans, got {scans}")
    if exif > MAX_EXIF_SEGMENTS:
        raise ImageError(f"expected at most {MAX_EXIF_SEGMENTS} segments of EXIF data, got {exif}")


def check_jpeg2000(file: IO[bytes]) -> tuple[int, ...]:
    """The depth of each component, once every tile is known to be there to its last byte.

    Raises:
        ImageError: without a name.
    """
    at, end = _find_codestream(file)
    depths: tuple[int, ...] = ()
    tiles, bytes_of_tile = 0, dict[int, int]()
    while True:
        file.seek(at)
        marker, length = _fields(file, ">HH") if at + 4 <= end else (_fields(file, ">H")[0], 0)
        if marker == J2K_START:
            at += 2
            continue
        if marker == J2K_END:
            break
        if marker == J2K_SIZE:
            _, x1, y1, _, _, width, height, x0, y0, count = _fields(file, ">HIIIIIIIIH")
            tiles = -(-(x1 - x0) // width) * -(-(y1 - y0) // height)
            depths = tuple((byte & 0x7F) + 1 for byte in _fields(file, f">{3 * count}B")[::3])
        elif marker == J2K_TILE_PART:
            tile, length, _, _ = _fields(file, ">HIBB")
            length = length or end - 2 - at  # 0: to the end of the code stream
            bytes_of_tile[tile] = bytes_of_tile.get(tile, 0) + length - TILE_PART_HEADER
            length -= 2  # counted from the marker, others are counted from behind it
        if length < 2 or at + 2 + length + 2 > end:
            raise ImageError("expected a complete JPEG 2000 code stream, got one that is cut")
        at += 2 + length
    whole = sum(size > 0 for size in bytes_of_tile.values())
    if whole < max(tiles, 1):
        raise ImageError(f"expected a JPEG 2000 code stream with all of its {tiles} tiles, got {whole}")
    return depths


def _find_codestream(file: IO[bytes]) -> tuple[int, int]:
    """Where the code stream lies in the file: at its start, or in the box `jp2c`."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(2) == J2K_START.to_bytes(2, "big"):
        return 0, end
    at = 0
    while at + 8 <= end:
        file.seek(at)
        (length, kind), header = _fields(file, ">I4s"), 8
        if length == 1:
            (length,), header = _fields(file, ">Q"), 16
        length = length or end - at  # 0: to the end of the file
        if length < header or at + length > end:
            break
        if kind == b"jp2c":
            return at + header, at + length
        at += length
    raise ImageError("expected a complete JPEG 2000 code stream, got a file that is cut before it")


def _fields(file: IO[bytes], layout: str) -> tuple[int, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise ImageError("expected a complete JPEG 2000 code stream, got one that is cut")
    return struct.unpack(layout, data)


def find_png_transparency(file: IO[bytes]) -> bytes:
    """The data of a PNG's `tRNS` chunk, empty without one."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(kind) < 4 or kind in (b"IDAT", b"IEND"):
            return b""
        if kind == b"tRNS":
            return file.read(min(length, 256))
        at += 12 + length

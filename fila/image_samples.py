"""Interprets a picture's samples (depth, white, transparent colour) and turns them into 8-bit RGB.

Pillow's mode says how samples are stored, not which value is white: grey of 12 bits comes in the mode of 16, a TIFF may
count down from white, a PNG's transparent colour has the file's own depth. `Samples.of` therefore reads these from the
file; for a picture that no longer has its file it uses the mode.
"""

import io
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin

from fila.errors import ImageError
from fila.image_files import check_jpeg, check_jpeg2000, find_png_transparency

FULL_16, FULL_32 = 2**16 - 1, 2**32 - 1
PNG_DEPTHS = {"1": 1, "L;2": 2, "L;4": 4, "I;16B": 16, "RGB;16B": 16}
# TIFF's tags, by the names of its specification.
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, PLANAR, COLOR_MAP = 258, 259, 262, 284, 320
SAMPLE_FORMAT, SUBSAMPLING = 339, 530
WHITE_IS_ZERO, YCBCR, SEPARATE_PLANES, SIGNED = 0, 6, 2, 2
FAX = ("tiff_ccitt", "group3", "group4", "tiff_raw_16")  # these need no photometric interpretation: white is zero


@dataclass(frozen=True)
class Samples:
    """The meaning of a picture's numbers.

    Attributes:
        full: the value of white where the mode holds more than 8 bits.
        chosen: whether `full` was chosen for these values, so that even a very dark picture is meant.
        white_is_zero: whether they still count down from white once decoded.
        depths: bits of each component, where fewer than 8 were shifted up to 8.
        transparent: the grey or colour that is transparent, in 8-bit values; of 16 bits, in those.
    """

    full: int = FULL_16
    chosen: bool = False
    white_is_zero: bool = False
    depths: tuple[int, ...] = ()
    transparent: tuple[int, ...] | None = None

    @classmethod
    def of(cls, image: Image.Image) -> "Samples":
        """The meaning that a picture's header gives; of one that is decoded, TIFF alone remembers it.

        Raises:
            ImageError: without a name, if Pillow would read it as another picture, or takes too long to decode it.
        """
        if hasattr(image, "tag_v2"):
            return _tiff_samples(image)
        file, tiles = getattr(image, "fp", None), getattr(image, "tile", None)
        if file is None or not tiles:
            return cls.of_mode(image)
        at = file.tell()
        try:
            if image.format == "PNG":
                return cls(transparent=_png_transparent(image, find_png_transparency(file)))
            if image.format in ("JPEG", "MPO"):
                check_jpeg(file, image.width * image.height)
            if image.format == "JPEG2000":
                return cls(depths=check_jpeg2000(file))
            if image.format == "PPM":  # Pillow scales to 16 bits what its header counts to another number
                return cls(chosen=tiles[0][0] != "raw")
            return cls.of_mode(image)
        finally:
            file.seek(at)

    @classmethod
    def of_mode(cls, image: Image.Image) -> "Samples":
        """The meaning that the mode alone gives."""
        key = image.info.get("transparency")
        if not isinstance(key, (int, tuple)) or not (image.mode in ("1", "L", "RGB") or image.mode[0] == "I"):
            return cls()
        key = key if isinstance(key, tuple) else (key,)
        if image.mode == "RGB" and max(key) > 255:
            raise ImageError("expected the file of this picture: its transparent colour has 16 bits, its pixels 8 left")
        return cls(transparent=key)


def _png_transparent(image: Image.Image, data: bytes) -> tuple[int, ...] | None:
    if image.mode == "P" or not data:
        return None  # a palette's transparency has its own form, which Pillow reads
    values = np.frombuffer(data[: len(data) // 2 * 2], ">u2")
    if len(values) < (3 if image.mode == "RGB" else 1):
        return None
    depth = PNG_DEPTHS.get(image.tile[0][3], 8)  # type: ignore[attr-defined]
    full = (1 << depth) - 1
    # Bits above the depth mean nothing (PNG, 11.3.2.1).
    key = [int(value) & full for value in values[: 3 if image.mode == "RGB" else 1]]
    return tuple(key if depth == 16 else [value * 255 // full for value in key])


def _tiff_samples(image: Image.Image) -> Samples:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    compression = image.info.get("compression")
    photometric, bits = tags.get(PHOTOMETRIC), tags.get(BITS_PER_SAMPLE, (1,))
    if photometric is None and compression not in (*FAX, "jpeg", "tiff_jpeg"):
        raise ImageError("expected a TIFF that says whether black or white is zero, got one without that tag")
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ImageError(f"expected a TIFF of unsigned or floating-point samples, got signed ones of {bits[0]} bits")
    if compression == "raw" and photometric == YCBCR and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1):
        raise ImageError("expected YCbCr without compression to have colours for each pixel, got them for each 2x2")
    if compression == "raw" and tags.get(PLANAR) == SEPARATE_PLANES and max(bits) > 8:
        raise ImageError(f"expected at most 8 bits in separate planes without compression, got {max(bits)}")
    if image.mode in ("P", "PA"):
        colours = tags.get(COLOR_MAP, ())
        if len(colours) != 3 << bits[0]:
            raise ImageError(f"expected {3 << bits[0]} numbers in the palette, got {len(colours)}")
        if max(colours) < 256:  # 8 bits where 16 belong, as old programs wrote them; Pillow would make them black
            image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    return Samples(
        full=(1 << bits[0]) - 1,
        chosen=bits[0] not in (16, 32),
        # Up to 8 bits Pillow turns them round itself.
        white_is_zero=photometric == WHITE_IS_ZERO and image.mode[0] in "IF",
    )


def low_bytes(data: IO[bytes]) -> np.ndarray:
    """The lower byte of each sample of a PNG of 16-bit RGB, of which Pillow decodes the higher."""
    data.seek(0)
    with Image.OPEN["PNG"][0](data, "") as image:
        image.tile = [image.tile[0]._replace(args="RGB;16L")]
        return np.array(image)


def to_rgb(image: Image.Image, samples: Samples, name: str, low: np.ndarray | None = None) -> Image.Image:
    """A decoded picture as 8-bit RGB over white.

    Args:
        low: the lower bytes of RGB of 16 bits, where a transparent colour has to be found in it.

    Raises:
        ImageError: if its numbers do not say what is white, or its mode has no conversion.
    """
    try:
        if image.mode[0] == "I" or image.mode == "F":
            return _grey(image, samples, name).convert("RGB")
        if image.mode == "La":
            image = image.convert("LA")
        if any(depth < 8 for depth in samples.depths):
            image = _spread(image, samples.depths)
        if samples.transparent is not None and image.mode in ("1", "L", "RGB"):
            return _without_colour(image.convert("RGB"), samples.transparent, low)
        if image.has_transparency_data and image.mode not in ("1", "L", "RGB"):
            rgba = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(rgba, mask=rgba.getchannel("A"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"{name}: expected colours that convert to RGB, got mode {image.mode}: {error}") from error


def _grey(image: Image.Image, samples: Samples, name: str) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, to 8 bits; a transparent value becomes white."""
    values = np.asarray(image)
    if values.dtype.kind in "iu":
        if values.dtype.itemsize == 4 and samples.full == FULL_32:
            values = values.view(np.uint32)  # Pillow's mode has a sign, the file has none
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > samples.full:
            raise ImageError(f"{name}: expected uint8, uint16 or floats in 0..1, got {values.dtype} in {low}..{high}")
        grey = _scaled_integers(values, samples.full, samples.chosen, name)
    else:
        grey = scaled(values, name)
    if samples.white_is_zero:
        grey = 255 - grey
    if samples.transparent is not None:
        grey[values == samples.transparent[0]] = 255
    return Image.fromarray(grey)


def scaled(values: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is, uint16 from 0..65535 and floats from 0..1 to uint8, rounded to nearest."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return _scaled_integers(values, FULL_16, False, name)
    if values.dtype.kind != "f":
        found = f"{values.dtype} in {values.min()}..{values.max()}" if values.dtype.kind in "iu" else str(values.dtype)
        raise ImageError(f"{name}: expected uint8, uint16 or floats in 0..1, got {found}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # so that NaN fails too
        raise ImageError(f"{name}: expected floats in 0..1, got values from {low:g} to {high:g}")
    return np.rint(values * 255).astype(np.uint8)


def _scaled_integers(values: np.ndarray, full: int, chosen: bool, name: str) -> np.ndarray:
    depth = full.bit_length()
    fitting = 255 if depth == 16 else FULL_16
    if not chosen and 0 < values.max() <= fitting:  # fewer bits in a wider type; scaled they would all be black
        raise ImageError(
            f"{name}: expected {depth}-bit values in 0..{full}, got at most {values.max()}: convert to "
            f"{'L (8 bits)' if depth == 16 else '16 bits'}"
        )
    wide = values.astype(np.uint32 if depth <= 16 else np.uint64)
    return ((wide * 255 + full // 2) // full).astype(np.uint8)


def _spread(image: Image.Image, depths: tuple[int, ...]) -> Image.Image:
    """Components of fewer than 8 bits, shifted up to 8 by the decoder, over all of 0..255."""
    if image.mode in ("P", "PA") or len(depths) < len(image.getbands()):
        raise ValueError(f"components of {depths} bits")
    table = []
    for depth in depths[: len(image.getbands())]:
        full = (1 << min(depth, 8)) - 1
        table += [(value >> (8 - min(depth, 8))) * 255 // full for value in range(256)]
    return image.point(table)


def _without_colour(image: Image.Image, colour: tuple[int, ...], low: np.ndarray | None) -> Image.Image:
    """RGB with one colour, or one grey, made white."""
    pixels = np.array(image)
    values = pixels if low is None else pixels.astype(np.uint16) << 8 | low
    pixels[(values == np.array(colour)).all(axis=2)] = 255
    return Image.fromarray(pixels)


def read_all(file: IO[bytes]) -> io.BytesIO:
    """A copy of a file in memory, its position kept."""
    at = file.tell()
    file.seek(0)
    copy = io.BytesIO(file.read())
    file.seek(at)
    return copy

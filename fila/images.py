"""Reads one picture from any source into 8-bit RGB, once; bad and unusual input is handled here and nowhere else.

The steps, each before those that depend on it:

    header      format and size are checked before any pixel is decoded; a picture too large is refused here
    frames      the first one of an animation or of several pages is used, with a note
    decoding    reads to the last byte, so that a truncated file is an error and not a grey area
    EXIF        rotation is applied, so that height and width are those a person sees
    depth       16 bits are scaled to 8
    alpha       transparency is laid over white, the colour of paper

A picture that cannot be used is an `ImageError`, whose message names the picture, what was expected and what came.
"""

import base64
import binascii
import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

from fila.geometry import Geometry, Layout

MAX_IMAGE_SIDE = 10_000
# Rasters only. Pillow would also open PostScript (by running an interpreter on it) and dozens of formats nobody sends.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
CHANNEL_ORDERS = ("channels_first", "channels_last")
EXIF_ORIENTATION = 0x0112


class ImageError(ValueError):
    """A picture that cannot be used; the message names it, what was expected and what came."""


class ImageWarning(UserWarning):
    """A picture that can be used, though not all of it was."""


@dataclass
class Picture:
    """A picture that has been read; every consumer takes it as it is, so that none reads it again.

    Attributes:
        image: a decoded PIL image of mode "RGB", upright, without transparency.
        name: the picture's name in messages.
        notes: what a user should know, for example that further frames were left out.
    """

    image: Image.Image
    name: str
    notes: tuple[str, ...] = ()
    _layout: Layout | None = field(default=None, init=False, repr=False, compare=False)

    def layout(self, geometry: Geometry) -> Layout:
        """The picture's layout under `geometry`, computed once."""
        if self._layout is None or self._layout.geometry != geometry:
            self._layout = geometry.layout(self.image.height, self.image.width)
        return self._layout


# What a user may hand over as one picture.
ImageSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor | Picture


def read_picture(
    source: ImageSource,
    *,
    input_data_format: str | None = None,
    max_side: int = MAX_IMAGE_SIDE,
    name: str | None = None,
) -> Picture:
    """Reads one picture as 8-bit RGB, turned the way its EXIF data says; a `Picture` is returned as it is.

    Args:
        source: a path, a `data:` URL, the bytes of a file, a binary file object, a PIL image, or an array or tensor of
            uint8, uint16 or floats in 0..1, [height, width] or with 1 to 4 channels (grey, grey + alpha, RGB, RGBA).
        input_data_format: "channels_first" or "channels_last"; needed for arrays of three dimensions, where a guess
            could turn a narrow picture on its side in silence.
        max_side: largest height and width accepted, pixels.
        name: the picture's name in messages; by default its path or its kind.

    Returns:
        The picture. Transparency lies over white, 16 bits are scaled to 8, CMYK and palettes are converted. Of several
        frames the first is used, and a note says so.

    Raises:
        ImageError: if the picture is too large, empty, truncated, in another format, or not a picture at all.

    Example:
        >>> read_picture(np.zeros((4, 6, 3), np.uint8), input_data_format="channels_last").image.size
        (6, 4)
    """
    if isinstance(source, Picture):
        _check_size(source.image.height, source.image.width, max_side, source.name)
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        name = name or f"{type(source).__name__} of shape {tuple(source.shape)}"
        return Picture(_over_white(_from_array(source, input_data_format, max_side, name), name), name)
    if isinstance(source, Image.Image):
        name = name or f"PIL image of mode {source.mode}"
        _check_size(source.height, source.width, max_side, name)
        return _finish(source, name)

    file, name = _as_file(source, name)
    try:
        with _open(file, name) as image:
            _check_size(image.height, image.width, max_side, name)
            return _finish(image, name)
    finally:
        if file is not source:
            file.close()


def load_picture(source: ImageSource, **options: Any) -> Picture:
    """`read_picture`, with an `ImageWarning` for each note of a picture that had not been read before."""
    picture = read_picture(source, **options)
    if picture is not source:
        for note in picture.notes:
            warnings.warn(note, ImageWarning, stacklevel=3)
    return picture


def load_image(source: ImageSource, **options: Any) -> Image.Image:
    """The PIL image of `load_picture`; `options` are the keyword arguments of `read_picture`.

    Example:
        >>> load_image(np.zeros((4, 6, 3), np.uint8), input_data_format="channels_last").size
        (6, 4)
    """
    return load_picture(source, **options).image


def _as_file(source: Any, name: str | None) -> tuple[IO[bytes], str]:
    """An open, seekable binary file for a path, a `data:` URL, bytes or a file object, and its name for messages."""
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)), name or "data: URL"
        except binascii.Error as error:
            raise ImageError(f"{name or 'data: URL'}: expected base64, got {error}") from error
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(f"{name or source}: expected a file, got a URL; nothing is fetched from the network here")
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        name = name or (path if len(path) <= 200 else path[:200] + "...")
        try:
            return Path(path).open("rb"), name
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise ImageError(f"{name}: expected a picture file, got: {reason}") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), name or f"{len(source)} bytes"
    if hasattr(source, "read"):
        name = name or str(getattr(source, "name", type(source).__name__))
        try:
            if hasattr(source, "seekable") and source.seekable():
                return source, name
            return io.BytesIO(source.read()), name  # a pipe; Pillow has to go back and forth
        except Exception as error:  # closed, failing, or of text
            raise ImageError(f"{name}: expected a binary file that can be read, got: {error}") from error
    raise ImageError(
        f"{name or 'image'}: expected a path, bytes, a binary file, a PIL image, an array or a tensor, "
        f"got {type(source).__name__}"
    )


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Reads the header only."""
    Image.init()
    try:
        with warnings.catch_warnings():
            # Pillow's own limit on the area warns below ours; the sides are checked right after.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_IMAGE_SIDE} pixels a side, got more: {error}") from error
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        got = "an empty file" if not file.read(1) else "something else, or a damaged header"
        raise ImageError(f"{name}: expected a picture ({', '.join(FORMATS)}), got {got}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ImageError(f"{name}: expected a picture, its header cannot be read: {error}") from error


def _check_size(height: int, width: int, max_side: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: expected at least 1x1 pixels, got {height}x{width}")
    if height > max_side or width > max_side:
        raise ImageError(
            f"{name}: expected at most {max_side}x{max_side} pixels, got {height}x{width} (height x width)"
        )


def _finish(image: Image.Image, name: str) -> Picture:
    """Decodes the first frame, turns it upright, and converts it to RGB over white."""
    try:
        if image.tell():
            image.seek(0)
        image.load()
    except Exception as error:
        raise ImageError(f"{name}: expected a complete picture, decoding failed: {error}") from error
    notes: list[str] = []
    frame = image
    try:
        # Looked up first, since the transposition copies the picture even where there is nothing to turn.
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            frame = ImageOps.exif_transpose(image)
    except Exception as error:
        notes.append(f"{name}: its EXIF data cannot be read, it is not rotated: {error}")
    if frame is image and isinstance(image, ImageFile.ImageFile):
        frame = image.copy()  # lets go of the file, and of the frames behind the first
    if _has_more_frames(image):
        notes.append(f"{name}: holds several frames, only the first is used")
    return Picture(_over_white(frame, name), name, tuple(notes))


def _has_more_frames(image: Image.Image) -> bool:
    # MPO is what many phones write for a single photograph: the further frames are previews of it.
    if image.format == "MPO":
        return False
    try:
        return getattr(image, "is_animated", False)  # looks one frame ahead; counting all would read the whole file
    except Exception:
        return True  # something follows that cannot be read


def _over_white(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, name)
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(rgba, mask=rgba.getchannel("A"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"{name}: expected colours that convert to RGB, got mode {image.mode}: {error}") from error


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, to 8 bits; a transparent grey value becomes white."""
    values = np.asarray(image)
    grey = _scaled(values.astype(np.uint16) if _fits_16_bit(values) else values, name)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _fits_16_bit(values: np.ndarray) -> bool:
    # Pillow's mode "I" is 32 bits wide, but holds what was 16 bits in the file.
    return values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 65535


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is, uint16 from 0..65535 and floats from 0..1 to uint8, rounded to nearest."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        if 0 < values.max() <= 255:  # 8 bits in a wider type; scaled they would all be black
            raise ImageError(
                f"{name}: expected 16-bit values in 0..65535, got at most {values.max()}: convert to L (8 bits)"
            )
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        found = f"{values.dtype} in {values.min()}..{values.max()}" if values.dtype.kind in "iu" else str(values.dtype)
        raise ImageError(f"{name}: expected uint8, uint16 or floats in 0..1, got {found}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # so that NaN fails too
        raise ImageError(f"{name}: expected floats in 0..1, got values from {low:g} to {high:g}")
    return np.rint(values * 255).astype(np.uint8)


def _from_array(array: np.ndarray | torch.Tensor, order: str | None, max_side: int, name: str) -> Image.Image:
    if isinstance(array, torch.Tensor):
        if array.layout != torch.strided or array.is_meta or array.is_quantized or array.is_complex():
            raise ImageError(
                f"{name}: expected a dense tensor of real numbers, got {array.dtype}, {array.layout} on {array.device}"
            )
        array = array.detach().cpu()
        # numpy knows no bfloat16
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim not in (2, 3):
        raise ImageError(f"{name}: expected [height, width] or three dimensions, got {array.ndim}")
    if array.ndim == 3:
        if order not in CHANNEL_ORDERS:
            raise ImageError(
                f"{name}: expected input_data_format to say {' or '.join(map(repr, CHANNEL_ORDERS))}, got {order!r}"
            )
        array = np.moveaxis(array, 0, -1) if order == "channels_first" else array
        if array.shape[2] not in (1, 2, 3, 4):
            raise ImageError(f"{name}: expected 1 to 4 channels in order {order}, got {array.shape[2]}")
        array = array[..., 0] if array.shape[2] == 1 else array
    _check_size(array.shape[0], array.shape[1], max_side, name)
    return Image.fromarray(np.ascontiguousarray(_scaled(array, name)))

"""Reads one picture from any source into 8-bit RGB, once; bad input is refused, unusual input read right.

The steps, each before those that depend on it:

    header      format and size are checked before any pixel is decoded (`fila.image_files`); a picture too large is
                refused here, and so is a file that is known to be cut, or to take very long
    samples     what white is and which colour is transparent: the file says so, not the mode (`fila.image_samples`)
    frames      the first one of an animation or of several pages is used, with a note
    decoding    reads to the last byte, so that a truncated file is an error and not a grey area
    depth       any other is scaled to 8 bits
    alpha       transparency is laid over white, the colour of paper
    EXIF        rotation is applied, so that height and width are those a person sees

A picture that cannot be used is an `ImageError`, whose message names the picture, what was expected and what came.
"""

import base64
import binascii
import io
import os
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageFile

from fila.errors import ImageError, ImageWarning
from fila.geometry import Geometry, Layout
from fila.image_files import check_size, open_file, read_whole, trusting_no_settings
from fila.image_samples import Samples, low_bytes, read_all, scaled, to_rgb

__all__ = [
    "MAX_IMAGE_SIDE",
    "ImageError",
    "ImageSource",
    "ImageWarning",
    "Picture",
    "load_image",
    "load_picture",
    "read_picture",
]

MAX_IMAGE_SIDE = 10_000
CHANNEL_ORDERS = ("channels_first", "channels_last")
CHANNELS = (1, 2, 3, 4)
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class Picture:
    """A picture that has been read; every consumer takes it as it is, so that none reads it again.

    Attributes:
        drawn: the picture as it was read: a decoded PIL image of mode "RGB", upright, without transparency, or the
            same as uint8 [height, width, 3] where an array was given.
        name: the picture's name in messages.
        notes: what a user should know, for example that further frames were left out.
    """

    drawn: Image.Image | np.ndarray
    name: str
    notes: tuple[str, ...] = ()
    _layout: Layout | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        if isinstance(self.drawn, Image.Image):
            return self.drawn
        return Image.fromarray(np.ascontiguousarray(self.drawn))

    @property
    def pixels(self) -> np.ndarray:
        """The picture as uint8 [height, width, 3], to be read only."""
        return np.array(self.drawn) if isinstance(self.drawn, Image.Image) else self.drawn

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, image pixels."""
        if isinstance(self.drawn, Image.Image):
            return self.drawn.height, self.drawn.width
        return self.drawn.shape[0], self.drawn.shape[1]

    def layout(self, geometry: Geometry) -> Layout:
        """The picture's layout under `geometry`, computed once."""
        if self._layout is None or self._layout.geometry != geometry:
            self._layout = geometry.layout(*self.size)
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
            A PIL image that was decoded or copied is taken in the value range of its mode: only the file says more.
        input_data_format: "channels_first" or "channels_last"; needed for arrays of three dimensions of which both the
            first and the last could be channels, where a guess could turn a narrow picture on its side in silence.
        max_side: largest height and width accepted, pixels.
        name: the picture's name in messages; by default its path or its kind.

    Returns:
        The picture. Transparency lies over white, any depth is scaled to 8 bits, CMYK and palettes are converted. Of
        several frames the first is used, and a note says so.

    Raises:
        ImageError: if the picture is too large, empty, truncated, in another format, or not a picture at all.

    Example:
        >>> read_picture(np.zeros((4, 6, 3), np.uint8)).image.size
        (6, 4)
    """
    if isinstance(source, Picture):
        check_size(*source.size, max_side, source.name)
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        name = name or f"{type(source).__name__} of shape {tuple(source.shape)}"
        array = _from_array(source, input_data_format, max_side, name)
        if array.ndim == 3 and array.shape[2] == 3:
            return Picture(array, name)
        return Picture(to_rgb(Image.fromarray(np.ascontiguousarray(array)), Samples(), name), name)
    if isinstance(source, Image.Image):
        name = name or f"PIL image of mode {source.mode}"
        check_size(source.height, source.width, max_side, name)
        with trusting_no_settings(max_side):
            return _finish(source, name)

    file, name = _as_file(source, name)
    try:
        with trusting_no_settings(max_side), open_file(file, name, max_side) as image:
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
        >>> load_image(np.zeros((4, 6, 3), np.uint8)).size
        (6, 4)
    """
    return load_picture(source, **options).image


def _as_file(source: Any, name: str | None) -> tuple[IO[bytes], str]:
    """An open, seekable binary file for a path, a `data:` URL, bytes or a file object, and its name for messages."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(_from_data_url(source, name or "data: URL")), name or "data: URL"
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ImageError(f"{name or source}: expected a file, got a URL; nothing is fetched from the network here")
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        name = name or (path if len(path) <= 200 else path[:200] + "...")
        try:
            file = Path(path).open("rb")  # noqa: SIM115 (the caller closes it)
            if file.seekable():
                return file, name
            with file:
                return read_whole(file, name), name
        except ImageError:
            raise
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
            return read_whole(source, name), name  # a pipe; Pillow has to go back and forth
        except ImageError:
            raise
        except Exception as error:  # closed, failing, or of text
            raise ImageError(f"{name}: expected a binary file that can be read, got: {error}") from error
    raise ImageError(
        f"{name or 'image'}: expected a path, bytes, a binary file, a PIL image, an array or a tensor, "
        f"got {type(source).__name__}"
    )


def _from_data_url(url: str, name: str) -> bytes:
    """The contents of a `data:` URL (RFC 2397); base64 may be broken into lines and go without its padding."""
    header, comma, body = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: expected data:TYPE;base64,DATA, got no comma")
    data = unquote_to_bytes(body) if "%" in body or not header.lower().rstrip().endswith(";base64") else body.encode()
    if not header.lower().rstrip().endswith(";base64"):
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: expected base64, got {error}") from error


def _finish(image: Image.Image, name: str) -> Picture:
    """Decodes the first frame, converts it to RGB over white, and turns it upright."""
    low = None
    try:
        _rewind(image)
        samples = Samples.of(image)
        # Pillow keeps 8 bits of each, too few to find a colour of 16.
        again = read_all(image.fp) if samples.transparent and _is_rgb_of_16_bits(image) else None  # type: ignore[attr-defined]
        image.load()
        if again is not None:
            low = low_bytes(again)
    except MemoryError:
        raise
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:
        raise ImageError(
            f"{name}: expected a complete picture, decoding failed: {error or type(error).__name__}"
        ) from error
    # Converted before it is turned: a transparent colour is looked for where it is.
    frame = to_rgb(image, samples, name, low)
    notes = []
    try:
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception as error:
        turn = None
        notes.append(f"{name}: its EXIF data cannot be read, it is not rotated: {error}")
    if turn is not None:
        frame = frame.transpose(turn)
        frame.info = {}  # read again, it must not be turned again
    if frame is image and isinstance(image, ImageFile.ImageFile):
        frame = image.copy()  # lets go of the file, and of the frames behind the first
    if _has_more_frames(image):
        notes.append(f"{name}: holds several frames, only the first is used")
    return Picture(frame, name, tuple(notes))


def _rewind(image: Image.Image) -> None:
    try:
        if image.tell():
            image.seek(0)
    except AttributeError:
        pass  # copied or pickled: decoded, and without a file to go back in


def _is_rgb_of_16_bits(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", None) or []
    return any(tile[3] == "RGB;16B" for tile in tiles)


def _has_more_frames(image: Image.Image) -> bool:
    # MPO is what many phones write for a single photograph: the further frames are previews of it. Ours are opened as
    # plain JPEG, other people's come as what Pillow takes them for.
    if image.format == "MPO":
        return False
    try:
        return getattr(image, "is_animated", False)  # looks one frame ahead; counting all would read the whole file
    except Exception:
        return True  # something follows that cannot be read


def _from_array(array: np.ndarray | torch.Tensor, order: str | None, max_side: int, name: str) -> np.ndarray:
    """uint8 [height, width], or with 2 to 4 channels behind; no copy of what is that already."""
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
        if _channel_order(array.shape, order, name) == "channels_first":
            array = np.moveaxis(array, 0, -1)
        if array.shape[2] not in CHANNELS:
            raise ImageError(f"{name}: expected 1 to 4 channels in order {order}, got {array.shape[2]}")
        array = array[..., 0] if array.shape[2] == 1 else array
    check_size(array.shape[0], array.shape[1], max_side, name)
    return scaled(array, name)


def _channel_order(shape: tuple[int, ...], order: str | None, name: str) -> str:
    """The order stated, or else the only one that the shape allows."""
    if order is not None:
        possible = [order] if order in CHANNEL_ORDERS else []
    else:
        possible = [
            found for found, count in zip(CHANNEL_ORDERS, (shape[0], shape[2]), strict=True) if count in CHANNELS
        ]
        if not possible:
            raise ImageError(f"{name}: expected 1 to 4 channels in the first or last dimension, got {tuple(shape)}")
    if len(possible) != 1:
        raise ImageError(
            f"{name}: expected input_data_format to say {' or '.join(map(repr, CHANNEL_ORDERS))}, got {order!r}"
        )
    return possible[0]

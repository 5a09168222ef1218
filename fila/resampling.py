"""Resizes, places and normalises pixels: from an 8-bit picture to the float32 that the networks read.

torch resizes by the filters that models use, in its vectorised 8-bit path, ten times as fast as Pillow and in Pillow's
order of passes. Each pass rounds to 8 bits, so a value is at most `TOLERANCE` levels of 255 off Pillow's, and one in
fifty is off at all. Pillow resizes by the other filters.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fila.geometry import Rect
from fila.images import Picture

# Both widen the filter with the step, and take the same cubic (a = -1/2) for it.
TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}

TOLERANCE = 2  # one level for each pass

# uint8 [1, 3, height, width] in channels-last memory, as torch's vectorised path wants it.
Pixels = torch.Tensor


def resizer(picture: Picture, resample: int) -> Callable[[int, int], Pixels]:
    """A function of height and width that resizes one picture, whose pixels are taken over once."""
    mode = TORCH_MODES.get(Image.Resampling(resample))
    if mode is None:
        return lambda height, width: _as_pixels(np.array(picture.image.resize((width, height), resample)))
    pixels = _as_pixels(picture.pixels)

    def resize(height: int, width: int) -> Pixels:
        if (height, width) == pixels.shape[2:]:
            return pixels
        once = pixels
        if _vertical_first(pixels.shape[2], pixels.shape[3], height, width):
            once = F.interpolate(pixels, (height, pixels.shape[3]), mode=mode, antialias=True)
        return F.interpolate(once, (height, width), mode=mode, antialias=True)

    return resize


def _vertical_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow 13 resizes columns before rows; what lies between is clipped to 8 bits, so the order shows."""
    return height - new_height > 2 * max(width - new_width, 0)


def _as_pixels(array: np.ndarray) -> Pixels:
    if not array.flags.writeable or min(array.strides) < 0:  # torch knows neither
        array = array.copy()
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)


def place(resize: Callable[[int, int], Pixels], size: tuple[int, int], content: Rect) -> Pixels:
    """The picture resized once into the content rectangle; the rest is black, as LLaVA-NeXT pads before normalising."""
    pixels = resize(int(content.height), int(content.width))
    if pixels.shape[2:] == size:
        return pixels
    canvas = torch.zeros(1, 3, *size, dtype=torch.uint8)
    _within(canvas, content).copy_(pixels)
    return canvas


def place_normalized(
    resize: Callable[[int, int], Pixels],
    size: tuple[int, int],
    content: Rect,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """The result of `place`, normalised: float32 [3, height, width], without a pass over the 8-bit canvas."""
    out = torch.empty(3, *size)
    pixels = resize(int(content.height), int(content.width))
    if pixels.shape[2:] != size:
        for channel, m, s in zip(out, mean, std, strict=True):
            channel.fill_(-m / s)
    normalize(pixels[0], mean, std, out=_within(out, content))
    return out


def _within(canvas: torch.Tensor, content: Rect) -> torch.Tensor:
    return canvas[..., int(content.y0) : int(content.y1), int(content.x0) : int(content.x1)]


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], out: torch.Tensor) -> None:
    """(pixels / 255 - mean) / std from uint8 into float32 `out`, both [3, ...], as one scale and shift per channel."""
    shape = (3,) + (1,) * (out.ndim - 1)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).view(shape)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(shape)
    # Channels are parted while they are bytes: a quarter of what would have to move afterwards.
    out.copy_(pixels.contiguous()).mul_(scale).sub_(shift)

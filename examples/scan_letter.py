"""Makes scan.jpg, a typed letter head as from a scanner: paper, a slight turn, soft focus, shadow and grain."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TYPEFACE = "/usr/share/fonts/truetype/liberation/LiberationSerif-Regular.ttf"  # Debian: fonts-liberation
SIZE = (680, 700)
LINES = [  # size and text; nothing but space where there is no text
    (72, "Willow Clinic"),
    (40, ""),
    (60, "Date: 7 Nov 2025"),
    (60, "Client: Robin"),
    (60, "Invoice: 88213"),
    (60, "Amount due: 940.50"),
    (40, ""),
    (60, "Yours, M. Heron"),
]


def typed() -> Image.Image:
    page = Image.new("L", SIZE, 255)
    pen = ImageDraw.Draw(page)
    y = 31
    for size, text in LINES:
        pen.text((62, y), text, 30, ImageFont.truetype(TYPEFACE, size), anchor="lt" if text else None)
        y += round(size * (1.42 if text else 0.7))
    return page


def scanned(page: Image.Image, seed: int = 7) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = page.size
    ink = page.filter(ImageFilter.GaussianBlur(1.4)).rotate(-0.6, Image.Resampling.BICUBIC, fillcolor=255)
    # Fibres: noise smoothed along one direction, then the other, on a slightly yellow ground.
    fibre = Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).filter(ImageFilter.GaussianBlur(2.5))
    fibre = (np.asarray(fibre, np.float32) - 127.5) * 0.35
    ground = np.array([243.0, 239.0, 228.0]) + fibre[..., None]
    # The shadow where the sheet lifts off the glass, along the left edge.
    lifted = np.clip(1 - np.arange(width) / 46, 0, 1) ** 2
    light = 1 - 0.28 * lifted[None, :, None]
    grain = rng.normal(0, 3.0, (height, width, 1))
    share = (np.asarray(ink, np.float32) / 255)[..., None]
    pixels = (share * ground + (1 - share) * np.array([38.0, 36.0, 44.0])) * light + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    target = Path(__file__).with_name("scan.jpg")
    scanned(typed()).save(target, quality=80)

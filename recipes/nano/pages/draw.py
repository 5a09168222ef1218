"""Draws a planned page: paper, panels, shapes, every glyph at its own place, then the wear of a scan."""

import io
import math
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from recipes.nano.pages.blocks import Block, Mark, Run, Stroke
from recipes.nano.pages.page import Page


def draw_page(page: Page) -> Image.Image:
    """The picture of a page, RGB, at image resolution."""
    layout = page.layout
    image = Image.new("RGB", (layout.width, layout.height), page.style.paper)
    draw = ImageDraw.Draw(image)
    sy, sx, oy, ox = frame(page)
    for block in page.blocks:
        _panel(draw, block, page)
        for stroke in block.strokes:
            _stroke(draw, stroke, block, page)
        for mark in block.marks:
            _mark(draw, mark, (mark.cx + block.x - ox) / sx, (mark.cy + block.y - oy) / sy, mark.r / sy)
        for run in block.runs:
            font = run.face.at(font_size(run, sy))
            x, y = (run.x + block.x - ox) / sx, (run.y + block.y - oy) / sy
            step = run.em / sx
            for char in run.text:
                if char != " ":
                    draw.text((x, y), char, font=font, fill=run.color, anchor="ls")
                x += run.face[char].advance * step
    return image if page.wear_seed is None else _wear(image, page)


def draw_glyph(page: Page, block: Block, run: Run, index: int) -> tuple[Image.Image, tuple[int, int]]:
    """One glyph drawn alone, white on black, at the place and size it has on the page.

    Returns:
        (patch of mode "L" with a margin beyond the reach of the resize's kernel, (y, x) of the patch in the image).
    """
    sy, sx, oy, ox = frame(page)
    font = run.face.at(font_size(run, sy))
    before = sum(run.face[c].advance for c in run.text[:index])
    x, y = (run.x + before * run.em + block.x - ox) / sx, (run.y + block.y - oy) / sy
    left, top, right, bottom = font.getbbox(run.text[index], anchor="ls")
    margin_x, margin_y = math.ceil(4 / sx), math.ceil(4 / sy)
    x0, y0 = max(0, math.floor(x + left) - margin_x), max(0, math.floor(y + top) - margin_y)
    x1 = min(page.layout.width, math.ceil(x + right) + margin_x)
    y1 = min(page.layout.height, math.ceil(y + bottom) + margin_y)
    patch = Image.new("L", (max(1, x1 - x0), max(1, y1 - y0)))
    ImageDraw.Draw(patch).text((x - x0, y - y0), run.text[index], font=font, fill=255, anchor="ls")
    return patch, (y0, x0)


def frame(page: Page) -> tuple[float, float, float, float]:
    """(canvas pixels per image pixel along y and x, y and x of the content's corner on the canvas)."""
    layout = page.layout
    content = layout.content
    return content.height / layout.height, content.width / layout.width, content.y0, content.x0


def font_size(run: Run, sy: float) -> float:
    """The run's font size in image pixels: sizes fall on halves, so that fonts can be cached."""
    return round(run.em / sy * 2) / 2


def _panel(draw: ImageDraw.ImageDraw, block: Block, page: Page) -> None:
    sy, sx, oy, ox = frame(page)
    x0, y0 = (block.x - 3 - ox) / sx, (block.y - oy) / sy
    x1, y1 = (block.x + block.width + 3 - ox) / sx, (block.y + block.height - oy) / sy
    width = max(1, round(0.8 / sx))
    if block.fill is not None or block.border is not None:
        draw.rectangle((x0, y0, x1, y1), fill=block.fill, outline=block.border, width=width)
    if block.rule is not None:
        draw.line((x0, y1, x1, y1), fill=block.rule, width=width)


def _stroke(draw: ImageDraw.ImageDraw, stroke: Stroke, block: Block, page: Page) -> None:
    sy, sx, oy, ox = frame(page)
    x0, x1 = (stroke.x0 + block.x - ox) / sx, (stroke.x1 + block.x - ox) / sx
    y0, y1 = (stroke.y0 + block.y - oy) / sy, (stroke.y1 + block.y - oy) / sy
    dash, width = 2.0 / sx, max(1, round(0.6 / sx))
    if not stroke.dashed:
        draw.line((x0, y0, x1, y1), fill=page.style.ink, width=width)
        return
    while x0 < x1:  # dashed lines are level
        draw.line((x0, y0, min(x0 + dash, x1), y1), fill=page.style.ink, width=width)
        x0 += 1.8 * dash


def _mark(draw: ImageDraw.ImageDraw, mark: Mark, x: float, y: float, r: float) -> None:
    fill = mark.color if mark.filled else None
    width = max(2, round(r / 5))
    if mark.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=mark.color, width=width)
        return
    if mark.shape == "square":
        side = r * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill, outline=mark.color, width=width)
        return
    if mark.shape == "triangle":
        points = [(x + 1.1 * r * math.sin(a), y + 0.2 * r - 1.1 * r * math.cos(a)) for a in (0.0, 2.0944, 4.1888)]
    else:
        points = [
            (x + q * math.sin(k * math.pi / 5), y - q * math.cos(k * math.pi / 5))
            for k in range(10)
            for q in ((1.15 * r if k % 2 == 0 else 0.48 * r),)
        ]
    draw.polygon(points, fill=fill, outline=mark.color, width=width)


def _wear(image: Image.Image, page: Page) -> Image.Image:
    """Blur, noise, uneven light and JPEG artefacts, each on some pages only and mild enough to stay legible."""
    rng = Random(page.wear_seed)
    sy = frame(page)[0]
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.6) / sy))
    if rng.random() < 0.25:
        low = rng.randint(190, 245)
        light = Image.new("L", (2, 2))
        light.putdata([rng.randint(low, 255) for _ in range(4)])
        light = light.resize(image.size, Image.Resampling.BILINEAR)
        image = ImageChops.multiply(image, Image.merge("RGB", (light, light, light)))
    if rng.random() < 0.25:
        generator = np.random.default_rng(rng.getrandbits(32))
        side = 256
        grain = generator.standard_normal((side, side), dtype=np.float32) * rng.uniform(2.0, 9.0) + 128.5
        tile = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        noise = Image.new("L", image.size)
        for y in range(0, image.height, side):
            for x in range(0, image.width, side):
                noise.paste(tile, (x, y))
        image = ImageChops.add(image, Image.merge("RGB", (noise, noise, noise)), offset=-128)
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(45, 90))
        image = Image.open(buffer)
        image.load()
    return image

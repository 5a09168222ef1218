"""Draws a picture that shows how an answer came about: canvas, tiles and seams, the raster's regions, the gates.

On the left stands the ViT's input: the picture on its canvas with padding, tiles, seams and token grid. On the right
stands the ConvNeXt's input: the high-resolution raster with the region of each tile and of the global view. Both have
the resolution that the model reads. Below follow the question, the answer, the global view and, for every fusion depth,
how strongly the CVFM changed the tokens of this picture, and where.

*Gate strength* is our measure: `||out - in|| / ||in||` over the patch tokens of one fusion (Frobenius norms), beside
the learned `alpha`. It holds for both forms of the gate.
"""

import io
import os
import secrets
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fila.fusion import Fusion, watching
from fila.geometry import Layout, Rect
from fila.modeling import FilaForConditionalGeneration

Color = tuple[int, int, int]

WIDTH, MARGIN, GAP = 1280, 36, 28
PANEL = (WIDTH - 2 * MARGIN - GAP) // 2  # width of each of the two panels
TALLEST = 640  # height of a panel's picture
INK, FAINT, PAPER, PADDING = (28, 30, 34), (108, 114, 122), (255, 255, 255), (58, 62, 68)
SEAM: Color = (230, 0, 60)
BAR: Color = (40, 96, 176)
# Okabe and Ito's colours, told apart by the colour-blind too; the global view has the black.
TILE_COLORS: tuple[Color, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (0, 114, 178), (213, 94, 0), (240, 228, 66),
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """One fusion's effect on one picture.

    Attributes:
        vit_layer: 0-based, as `fusion_layers` counts.
        convnext_stage, stride: from 1; raster pixels per cell. None for a fusion that reads several stages.
        alpha: the learned gate; None for a fusion without one.
        strength: `||out - in|| / ||in||` over all patch tokens of all views.
        token_strength: [V, G, G] float32, the same ratio for each token, global view first.
    """

    vit_layer: int
    convnext_stage: int | None
    stride: int | None
    alpha: float | None
    strength: float
    token_strength: np.ndarray


@contextmanager
def watch_gates(model: FilaForConditionalGeneration) -> Iterator[list[Gate]]:
    """Measures every fusion while this thread encodes one picture, and fills the list, shallowest first.

    Without fusion the list stays empty. Encode one picture at a time: the numbers of a batch would be mixed. Nothing is
    left on the model, so that threads may watch one model at once, each its own picture.
    """
    tower = model.model.vision_tower
    config = tower.config
    layers = {id(fusion): layer for layer, fusion in zip(config.fusion_layers or (), tower.fusion, strict=False)}
    gates: list[Gate] = []

    def measure(fusion: Fusion, before: torch.Tensor, after: torch.Tensor) -> None:
        layer = layers.get(id(fusion))
        if layer is None:
            return  # another model's
        prefix, stage = config.num_prefix_tokens, fusion.convnext_stage
        x, y = before[:, prefix:].detach().float(), after[:, prefix:].detach().float()
        size, change = x.norm(dim=-1), (y - x).norm(dim=-1)
        side = int(x.shape[1] ** 0.5)
        tiny = torch.finfo(torch.float32).tiny
        gates.append(
            Gate(
                layer,
                stage,
                None if stage is None else config.convnext_strides[stage - 1],
                fusion.opening(),
                float(change.norm() / size.norm().clamp_min(tiny)),
                (change / size.clamp_min(tiny)).view(-1, side, side).cpu().numpy(),
            )
        )

    with watching(measure):
        yield gates


def save(drawn: Image.Image, path: Path) -> None:
    """Saves a picture as PNG, whole or not at all: what stood at `path` stays until all of the new one is on the disk.

    A link is followed. A pipe, or another file that is not regular, is written to as it is.

    Raises:
        OSError: it cannot be written.
    """
    data = io.BytesIO()
    drawn.save(data, "PNG")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(data.getvalue())
        return
    beside = target.with_name(f".{secrets.token_hex(8)}.png")
    # Created by hand, so that it gets the rights of any new file.
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data.getvalue())
            file.flush()
            os.fsync(descriptor)
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def draw(picture: Image.Image, layout: Layout, question: str, answer: str, gates: Sequence[Gate]) -> Image.Image:
    """The explaining picture.

    Args:
        picture: the picture asked about, as `fila.images.load_image` returns it.
        layout: its layout. question, answer: the texts to show.
        gates: from `watch_gates`; empty for a model without fusion.

    Returns:
        An RGB picture 1280 pixels wide, with room for everything that is on it.
    """
    panels = [_canvas_panel(picture, layout), _raster_panel(picture, layout, bool(gates))]
    below = [_text_panel(picture, question, answer, layout), _gate_panel(gates, layout)]
    top = max(panel.height for panel in panels)
    height = 2 * MARGIN + top + sum(GAP + panel.height for panel in below)
    page = Image.new("RGB", (WIDTH, height), PAPER)
    for i, panel in enumerate(panels):
        page.paste(panel, (MARGIN + i * (PANEL + GAP), MARGIN))
    y = MARGIN + top
    for panel in below:
        ImageDraw.Draw(page).line((MARGIN, y + GAP // 2, WIDTH - MARGIN, y + GAP // 2), (222, 224, 228))
        y += GAP
        page.paste(panel, (MARGIN, y))
        y += panel.height
    return page


class _Frame:
    """A panel with a heading, and a drawing of `size` (height, width, any unit) below it, scaled to fit."""

    def __init__(self, size: tuple[int, int], title: str, lines: Sequence[str], footer: int = 0):
        self.scale = min(PANEL / size[1], TALLEST / size[0])
        self.head = 34 + 22 * len(lines) + 8
        self.height, self.width = (max(1, round(side * self.scale)) for side in size)
        self.image = Image.new("RGB", (PANEL, self.head + self.height + footer), PAPER)
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.draw.text((0, 0), title, INK, _font(24))
        for i, line in enumerate(lines):
            self.draw.text((0, 34 + 22 * i), line, FAINT, _font(16))

    def at(self, rect: Rect) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of a rectangle on the panel, edges."""
        x0, x1 = (round(x * self.scale) for x in (rect.x0, rect.x1))
        y0, y1 = (self.head + round(y * self.scale) for y in (rect.y0, rect.y1))
        return x0, y0, x1, y1

    def place(self, picture: Image.Image, whole: Rect, content: Rect) -> None:
        """Padding over `whole`, hatched so that it is not taken for a dark picture, and the picture over `content`."""
        x0, y0, x1, y1 = self.at(whole)
        self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), PADDING)
        hatch = Image.new("L", (x1 - x0, y1 - y0), 0)
        lines = ImageDraw.Draw(hatch)
        for x in range(-hatch.height, hatch.width, 12):
            lines.line((x, hatch.height, x + hatch.height, 0), 255)
        self.image.paste((84, 89, 97), (x0, y0), hatch)
        x0, y0, x1, y1 = self.at(content)
        # First to the pixels it has there, then to the panel's.
        pixels = picture.resize((int(content.width), int(content.height)), Image.Resampling.BICUBIC)
        self.image.paste(pixels.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BICUBIC), (x0, y0))

    def outline(self, rect: Rect, color: Color, width: int, inset: int = 0) -> None:
        x0, y0, x1, y1 = self.at(rect)
        x0, y0, x1, y1 = x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset
        if x1 > x0 and y1 > y0:
            self.draw.rectangle((x0, y0, x1, y1), None, color, width)

    def label(self, rect: Rect, text: str, color: Color) -> None:
        """A tag in a corner of a rectangle: an outer one, since what matters happens where rectangles meet."""
        x0, y0, x1, y1 = self.at(rect)
        width, height = round(_font(15).getlength(text)) + 10, 19
        x = x1 - 3 - width if x0 + x1 > self.width + 2 else x0 + 2
        y = y1 - 3 - height if y0 + y1 > 2 * self.head + self.height + 2 else y0 + 2
        self.draw.rectangle((x, y, x + width, y + height), color)
        self.draw.text((x + 5, y + 10), text, PAPER if sum(color) < 420 else INK, _font(15), anchor="lm")

    def dashed(self, x0: int, y0: int, x1: int, y1: int, color: Color, width: int = 3, dash: int = 9) -> None:
        """A horizontal or vertical dashed line."""
        length = max(x1 - x0, y1 - y0)
        for start in range(0, length, 2 * dash):
            end = min(start + dash, length)
            ends = (x0 + start, y0, x0 + end, y0) if y0 == y1 else (x0, y0 + start, x0, y0 + end)
            self.draw.line(ends, color, width)


def _canvas_panel(picture: Image.Image, layout: Layout) -> Image.Image:
    height, width = layout.canvas
    grid = layout.geometry.grid
    tile = layout.geometry.tile
    if layout.rows:
        lines = [
            f"picture {picture.width} x {picture.height}, fitted to a canvas of {width} x {height}: "
            f"{layout.rows} x {layout.columns} tiles of {tile}",
            f"and the whole picture once more, stretched to {tile} x {tile}",
            f"each view becomes {grid} x {grid} tokens; the language model gets {layout.num_tokens} in all",
        ]
    else:
        lines = [
            f"picture {picture.width} x {picture.height}, stretched to one view of {tile} x {tile}, no tiles",
            f"{grid} x {grid} tokens; the language model gets {layout.num_tokens} in all",
        ]
    frame = _Frame(layout.canvas, "What the ViT reads", lines, footer=30)
    whole = Rect(0, 0, height, width)
    frame.place(picture, whole, layout.content)
    patch = layout.geometry.patch
    for x in range(patch, width, patch):
        x0, y0, _, y1 = frame.at(Rect(0, x, height, x))
        frame.draw.line((x0, y0, x0, y1 - 1), (90, 130, 190, 70))
    for y in range(patch, height, patch):
        x0, y0, x1, _ = frame.at(Rect(y, 0, y, width))
        frame.draw.line((x0, y0, x1 - 1, y0), (90, 130, 190, 70))
    _tiles(frame, layout.tiles)
    for x in range(tile, width if layout.rows else 0, tile):
        x0, y0, _, y1 = frame.at(Rect(0, x, height, x))
        frame.dashed(x0, y0, x0, y1, SEAM)
    for y in range(tile, height if layout.rows else 0, tile):
        x0, y0, x1, _ = frame.at(Rect(y, 0, y, width))
        frame.dashed(x0, y0, x1, y0, SEAM)
    entries: list[tuple[str, Color]] = [("seam", SEAM)] if len(layout.tiles) > 1 else []
    entries += [("token grid", (150, 172, 206))]
    if layout.content != whole:
        entries += [("padding", PADDING)]
    _legend(frame, entries)
    return frame.image


def _raster_panel(picture: Image.Image, layout: Layout, fused: bool) -> Image.Image:
    title = "What the ConvNeXt reads"
    if not fused:
        return _Frame((1, 10), title, ["nothing: this model has fusion off and reads tiles alone"]).image
    height, width = layout.raster
    rule = layout.geometry.rule
    lines = [f"the whole picture at once, on a raster of {width} x {height}"]
    if rule == "scaled":
        lines += [f"{layout.scale[0]:.3g} raster pixels for each canvas pixel; no seam here"]
    else:
        lines += [f'rule "{rule}": mapped to a fixed size, each axis on its own scale']
    if layout.rows:
        lines += ["coloured: the region of it that each numbered tile is given"]
    frame = _Frame(layout.raster, title, lines, footer=30)
    frame.place(picture, Rect(0, 0, height, width), layout.raster_content)
    views = [Rect(*box) for box in layout.boxes(1)]
    for i, region in enumerate(views[1:]):
        x0, y0, x1, y1 = frame.at(region)
        frame.draw.rectangle((x0, y0, x1 - 1, y1 - 1), (*_tile_color(i), 46))
    x0, y0, x1, y1 = frame.at(views[0])
    for line in (
        (x0, y0 + 1, x1, y0 + 1),
        (x0, y1 - 2, x1, y1 - 2),
        (x0 + 1, y0, x0 + 1, y1),
        (x1 - 2, y0, x1 - 2, y1),
    ):
        frame.dashed(*line, INK, width=3, dash=6)
    _tiles(frame, views[1:])
    _legend(frame, [("global view's region (dashed)", INK)])
    return frame.image


def _tiles(frame: _Frame, tiles: Sequence[Rect]) -> None:
    for i, tile in enumerate(tiles):
        frame.outline(tile, _tile_color(i), 2, inset=2)
        frame.label(tile, str(i + 1), _tile_color(i))


def _legend(frame: _Frame, entries: Sequence[tuple[str, Color]]) -> None:
    x, y = 0, frame.head + frame.height + 10
    for text, color in entries:
        frame.draw.rectangle((x, y + 3, x + 14, y + 15), color)
        frame.draw.text((x + 20, y), text, FAINT, _font(15))
        x += 44 + round(_font(15).getlength(text))


def _text_panel(picture: Image.Image, question: str, answer: str, layout: Layout) -> Image.Image:
    """Question and answer, and on the right the global view with its name."""
    side = 128
    room = WIDTH - 2 * MARGIN - side - 150
    rows = [(line, 20, FAINT) for line in _wrapped(question, 20, room)]
    rows += [(line, 32, INK) for line in _wrapped(answer or "(no answer)", 32, room)]
    if layout.rows and not layout.tiles_reach_llm:
        rows += [("so long a picture that no tile reaches the language model, only the global view", 18, SEAM)]
    height = max(side + 2, sum(round(size * 1.35) for _, size, _ in rows))
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, height), PAPER)
    pen = ImageDraw.Draw(panel)
    y = 0
    for text, size, color in rows:
        pen.text((0, y), text, color, _font(size))
        y += round(size * 1.35)
    tile = layout.geometry.tile
    view = picture.resize((tile, tile), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)
    x = panel.width - side
    pen.rectangle((x - 2, 0, panel.width - 1, side + 1), None, INK)
    panel.paste(view, (x - 1, 1))
    pen.text((x - 14, 0), "global view", FAINT, _font(16), anchor="ra")
    pen.text((x - 14, 22), f"{tile} x {tile}", FAINT, _font(16), anchor="ra")
    return panel


def _wrapped(text: str, size: int, room: int) -> list[str]:
    """Lines of at most `room` pixels; eight of them at most."""
    per_line = max(8, int(room / _font(size).getlength("n")))
    lines = textwrap.wrap(" ".join(text.split()), per_line) or [""]
    return lines if len(lines) <= 8 else [*lines[:7], lines[7][:-3] + "..."]


def _gate_panel(gates: Sequence[Gate], layout: Layout) -> Image.Image:
    """A row for each depth: names, alpha, bar, and the tokens' own strength laid out as the tiles are."""
    width = WIDTH - 2 * MARGIN
    if not gates:
        panel = Image.new("RGB", (width, 66), PAPER)
        pen = ImageDraw.Draw(panel)
        pen.text((0, 0), "Gates", INK, _font(24))
        pen.text((0, 36), "none: this model has fusion off", FAINT, _font(16))
        return panel
    maps = [_token_map(gate, layout) for gate in gates]
    shown = min(150 / maps[0].shape[1], 84 / maps[0].shape[0])
    map_width, map_height = (max(8, round(side * shown)) for side in maps[0].shape[::-1])
    row, head = max(58, map_height + 14), 68
    panel = Image.new("RGB", (width, head + row * len(gates)), PAPER)
    pen = ImageDraw.Draw(panel)
    pen.text((0, 0), "How strongly each fusion changed the tokens", INK, _font(24))
    pen.text((0, 34), "||out - in|| / ||in|| over this picture's patch tokens; layers count from 0", FAINT, _font(16))
    pen.text((width, 34), "where (darkest = most)", FAINT, _font(16), anchor="ra")
    left, right = 330, width - 290
    longest = max(max(gate.strength for gate in gates), 1e-12)
    for i, (gate, values) in enumerate(zip(gates, maps, strict=True)):
        top = head + i * row
        middle = top + row // 2
        source = "ConvNeXt" if gate.convnext_stage is None else f"ConvNeXt stage {gate.convnext_stage}"
        names = f"ViT layer {gate.vit_layer}  +  {source}"
        details = [f"stride {gate.stride}"] if gate.stride is not None else []
        details += [f"alpha {gate.alpha:.3g}"] if gate.alpha is not None else []
        pen.text((0, middle - 12), names, INK, _font(18), anchor="lm")
        pen.text((0, middle + 12), ", ".join(details), FAINT, _font(16), anchor="lm")
        pen.rectangle((left, middle - 13, right, middle + 13), (238, 240, 243))
        length = round((right - left) * gate.strength / longest)
        if length:
            pen.rectangle((left, middle - 13, left + length, middle + 13), BAR)
        pen.text((right + 14, middle), f"{gate.strength:.3g}", INK, _font(18), anchor="lm")
        heat = _heat(values).resize((map_width, map_height), Image.Resampling.NEAREST)
        x, y = width - map_width, middle - map_height // 2
        panel.paste(heat, (x, y))
        pen.rectangle((x - 1, y - 1, x + map_width, y + map_height), None, (170, 175, 182))
    return panel


def _token_map(gate: Gate, layout: Layout) -> np.ndarray:
    """[rows * G, columns * G] token strengths as the tiles lie on the canvas; the one view where there are no tiles."""
    values = gate.token_strength
    if not layout.rows:
        return values[0]
    grid = values.shape[-1]
    tiles = values[1:].reshape(layout.rows, layout.columns, grid, grid)
    return tiles.transpose(0, 2, 1, 3).reshape(layout.rows * grid, layout.columns * grid)


def _heat(values: np.ndarray) -> Image.Image:
    """White for nothing to dark blue for the largest value."""
    share = (values / max(float(values.max()), 1e-12))[..., None]
    low, high = np.array([255.0, 255.0, 255.0]), np.array([16.0, 48.0, 112.0])
    return Image.fromarray(np.rint(low + share * (high - low)).astype(np.uint8))


def _tile_color(i: int) -> Color:
    return TILE_COLORS[i % len(TILE_COLORS)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own face: there on every machine."""
    return ImageFont.load_default(size)


__all__ = ["Gate", "draw", "save", "watch_gates"]

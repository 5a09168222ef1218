"""Batches for training: generated pages, the conversation about each, and where every character stands.

Shapes: V views of a page, N patches a view, S `slots_per_token` of the patch, L text length.

The *character map* is the dense target of stage 0: the canvas is divided into slots of 4 x 8 pixels (width x height), a
patch of 16 into 4 columns and 2 rows of them, and each slot is labelled with the character whose ink centre lies in it.
The *coverage map* labels every cell of 4 x 4 pixels with the character that covers it; it is what the ConvNeXt's second
stage, whose cells are that small, learns first.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fila.fragments.fonts import FontSet
from fila.fragments.pages import CHARSET, SHAPES, Sample, make_sample
from fila.geometry import Geometry, Layout
from fila.image_processing import FilaImageProcessor
from fila.tokenization import ASSISTANT, EOS, IMAGE, USER

SLOT_HEIGHT, SLOT_WIDTH, LEFT = 8, 4, 3
COVER, REACH = 4, (4.5, 3.2)  # canvas pixels: side of a cell; half height and half width of a character
CLASSES = {char: i + 1 for i, char in enumerate([*CHARSET, *SHAPES.values()])}
NUM_CLASSES = 1 + len(CLASSES)  # class 0 is an empty slot
IGNORE = -100
TRANSCRIBE, LINE_BREAK, LONGEST_TRANSCRIPT = "Read the page.", "|", 160


def slots_per_patch(patch: int) -> int:
    """Character slots in a patch of that many canvas pixels."""
    return (patch // SLOT_HEIGHT) * (patch // SLOT_WIDTH)


def character_map(sample: Sample) -> Tensor:
    """[canvas height / 8, canvas width / 4] int64: the class of the character centred in each slot, 0 for none.

    Of two characters in one slot, which a narrow face can do, the one further right wins.
    """
    height, width = sample.canvas[0] // SLOT_HEIGHT, sample.canvas[1] // SLOT_WIDTH
    slots = torch.zeros(height, width, dtype=torch.int64)
    for glyph in sorted(sample.glyphs, key=lambda g: g.cx):
        row, column = int(glyph.cy // SLOT_HEIGHT), int(glyph.cx // SLOT_WIDTH)
        if 0 <= row < height and 0 <= column < width and glyph.char in CLASSES:
            slots[row, column] = CLASSES[glyph.char]
    return slots


def coverage_map(sample: Sample) -> Tensor:
    """[canvas height / 4, canvas width / 4] int64: the class of the character over each cell, 0 for none.

    A character covers the cells whose centre lies within `REACH` of its own; the nearer of two along x wins.
    """
    height, width = sample.canvas[0] // COVER, sample.canvas[1] // COVER
    covered = torch.zeros(height, width, dtype=torch.int64)
    distance = torch.full((height, width), float("inf"))
    for glyph in sample.glyphs:
        rows, columns = (
            range(max(0, math.ceil((c - reach) / COVER - 0.5)), min(size, math.floor((c + reach) / COVER + 0.5)))
            for c, reach, size in ((glyph.cy, REACH[0], height), (glyph.cx, REACH[1], width))
        )
        for column in columns:
            away = abs((column + 0.5) * COVER - glyph.cx)
            for row in rows:
                if away < distance[row, column]:
                    distance[row, column], covered[row, column] = away, CLASSES[glyph.char]
    return covered


def cells(slots: Tensor, size: int) -> Tensor:
    """Regroups a character map by cells of `size` canvas pixels: [rows, columns, slots of a cell]."""
    h, w = size // SLOT_HEIGHT, size // SLOT_WIDTH
    rows, columns = slots.shape[0] // h, slots.shape[1] // w
    return slots.view(rows, h, columns, w).permute(0, 2, 1, 3).reshape(rows, columns, h * w)


def slots_per_token(patch: int) -> int:
    """What a patch's token should know: its own slots, and for every row of them the character to the left."""
    return slots_per_patch(patch) + patch // SLOT_HEIGHT


def left_characters(slots: Tensor, patch: int) -> Tensor:
    """[rows, columns, slot rows of a patch]: the last character before each patch, at most `LEFT` slots away, or 0.

    It is what makes text readable in one look: "what follows a t" is then written on the very token that holds it.
    """
    padded = torch.nn.functional.pad(slots, (LEFT, 0))
    first = torch.arange(0, slots.shape[1], patch // SLOT_WIDTH) + LEFT
    left = torch.zeros(slots.shape[0], len(first), dtype=slots.dtype)
    for away in range(LEFT, 0, -1):
        near = padded[:, first - away]
        left = torch.where(near > 0, near, left)
    return left.view(-1, patch // SLOT_HEIGHT, len(first)).transpose(1, 2)


def view_labels(slots: Tensor, layout: Layout) -> Tensor:
    """[V, N, S]: the character map as the views see it, and behind it the characters to the left.

    The global view is unreadable and carries `IGNORE`.
    """
    grid, patch = layout.geometry.grid, layout.geometry.patch
    patches = torch.cat([cells(slots, patch), left_characters(slots, patch)], dim=-1)
    if not layout.rows:
        return patches.reshape(1, grid * grid, -1)
    tiles = patches.view(layout.rows, grid, layout.columns, grid, -1).permute(0, 2, 1, 3, 4)
    tiles = tiles.reshape(layout.rows * layout.columns, grid * grid, -1)
    return torch.cat([torch.full_like(tiles[:1], IGNORE), tiles])


def conversation(sample: Sample, num_image_tokens: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids and labels of everything asked about a page, as turns of the chat template.

    Only answers and their `<eos>` are learned. The picture comes once, in the first turn; the page's transcript comes
    last, where no question can be answered from it.
    """
    ids = [tokenizer.bos_token_id]
    labels = [IGNORE]
    transcript = (TRANSCRIBE, LINE_BREAK.join(sample.lines)[:LONGEST_TRANSCRIPT])
    for turn, (question, answer) in enumerate([*sample.questions, transcript]):
        picture = IMAGE * num_image_tokens if turn == 0 else ""
        asked = tokenizer.encode(USER + picture + question + ASSISTANT, add_special_tokens=False)
        said = tokenizer.encode(answer + EOS, add_special_tokens=False)
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return torch.tensor(ids), torch.tensor(labels)


@dataclass
class Page:
    """One training example; see the module's legend for shapes. Pictures are None in text-only stages."""

    size: tuple[int, int]
    layout: Layout
    slots: Tensor
    coverage: Tensor
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    high_res_pixel_values: Tensor | None


@dataclass
class PageBatch:
    """Pages put together: keyword arguments for `FilaForConditionalGeneration`, layouts and character maps."""

    inputs: dict[str, Tensor]
    labels: Tensor
    layouts: list[Layout]
    slots: list[Tensor]
    coverage: list[Tensor]


class Pages(Dataset):
    """Generated pages, page i of seed s being the same on every machine.

    Args:
        processor, tokenizer: those of the model being trained.
        geometry: the layout rules; the processor's, unless pages are drawn for another canvas.
        fonts: faces of the split.
        split: "train" or "test": its words and labels.
        seed: added to the index.
        length: number of pages.
        render: whether pictures are drawn; a text-only stage needs none.
    """

    def __init__(
        self,
        processor: FilaImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry,
        fonts: FontSet,
        *,
        split: str,
        seed: int,
        length: int,
        render: bool = True,
    ):
        self.processor, self.tokenizer, self.geometry, self.fonts = processor, tokenizer, geometry, fonts
        self.split, self.seed, self.length, self.render = split, seed, length, render

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Page:
        sample = make_sample(
            self.seed + index, split=self.split, fonts=self.fonts, geometry=self.geometry, render=self.render
        )
        return self.page(sample)

    def page(self, sample: Sample) -> Page:
        """Turns a generated sample into tensors."""
        layout = self.geometry.layout(*sample.size)
        input_ids, labels = conversation(sample, layout.num_tokens, self.tokenizer)
        pixels = raster = None
        if self.render:
            features = self.processor(sample.image, return_tensors="pt")
            pixels, raster = features["pixel_values"][0], features["high_res_pixel_values"][0]
        return Page(sample.size, layout, character_map(sample), coverage_map(sample), input_ids, labels, pixels, raster)


class Curriculum(Dataset):
    """Easy pages alone up to index `until`, then one in four among the full ones. Both must have the same length."""

    def __init__(self, easy: Pages, full: Pages, until: int):
        self.easy, self.full, self.until, self.tokenizer = easy, full, until, full.tokenizer

    def __len__(self) -> int:
        return len(self.full)

    def __getitem__(self, index: int) -> Page:
        return (self.easy if index < self.until or index % 4 == 0 else self.full)[index]


def collate(pages: list[Page], pad_id: int) -> PageBatch:
    """Pads to the batch's largest; padding is transport only and is cut off again by the model."""
    inputs = {
        "input_ids": _pad([p.input_ids for p in pages], pad_id),
        "image_sizes": torch.tensor([p.size for p in pages]),
    }
    pixels = [p.pixel_values for p in pages if p.pixel_values is not None]
    rasters = [p.high_res_pixel_values for p in pages if p.high_res_pixel_values is not None]
    if pixels:
        inputs |= {"pixel_values": _pad(pixels, 0), "high_res_pixel_values": _pad(rasters, 0)}
    labels = _pad([p.labels for p in pages], IGNORE)
    return PageBatch(inputs, labels, [p.layout for p in pages], [p.slots for p in pages], [p.coverage for p in pages])


def _pad(tensors: list[Tensor], value: float) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    out = tensors[0].new_full((len(tensors), *shape), value)
    for row, tensor in zip(out, tensors, strict=True):
        row[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def loader(pages: Pages | Curriculum, batch_size: int, start: int, workers: int = 1, stride: int = 1) -> DataLoader:
    """Batches of every `stride`-th page from page `start` on, drawn ahead in worker processes."""
    return DataLoader(
        pages,
        batch_size=batch_size,
        sampler=range(start, len(pages), stride),
        num_workers=workers,
        collate_fn=partial(collate, pad_id=pages.tokenizer.pad_token_id),
        prefetch_factor=4 if workers else None,
        drop_last=True,
    )

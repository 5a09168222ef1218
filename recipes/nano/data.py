"""Batches for training: generated pages, the conversation about each, and where every character stands.

Shapes: V views of a page, N patches per view, S `SLOTS`, L text length.

Stage 0 has two dense targets. The *character map* labels each patch with its characters from left to right (ink centre
within the patch's columns, line through its rows), and with the character to the left of the first. The *coverage map*
labels every cell of 4 x 4 pixels with the character that covers it: the ConvNeXt's second stage, whose cells are that
small, learns it first.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fila.geometry import Geometry, Layout
from fila.image_processing import FilaImageProcessor
from recipes.nano.guidance import Guides, guides
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import CHARSET, SHAPES, Sample
from recipes.nano.pages.sources import draw
from recipes.nano.tokenizer import ASSISTANT, EOS, IMAGE, USER

HELD = 3  # characters of its own that a patch is asked for; more than three on 8 pixels are not met
SLOTS = HELD + 1  # and the one to their left
REACH_LEFT = 2  # patches between a patch and the character before it
COVER = 4  # canvas pixels: side of a cell of the coverage map
REACH = (0.6, 0.42)  # half height and half width of a character, in heights of a capital
CLASSES = {char: i + 1 for i, char in enumerate([*CHARSET, " ", *SHAPES.values()])}
NUM_CLASSES = 1 + len(CLASSES)  # class 0 is an empty slot
IGNORE = -100
TOGETHER = 8  # batches
TRANSCRIBE, LINE_BREAK, LONGEST_TRANSCRIPT = "Read the page.", "|", 160
TRANSCRIBED = 40  # one page in so many; what kind of page it is does not depend on its index


def character_map(sample: Sample, patch: int) -> Tensor:
    """[canvas height / patch, canvas width / patch, S] int64: classes of the characters of each patch, 0 for none.

    The first `HELD` are its own from left to right, the last is the one before them on their line, at most `REACH_LEFT`
    patches away. That one makes text readable in one look: "what follows a t" is then written on a single token. A
    patch without a character has nothing to its left either.
    """
    rows, columns = sample.canvas[0] // patch, sample.canvas[1] // patch
    lines: dict[int, list[tuple[float, int]]] = {}
    for glyph in sample.glyphs:
        lines.setdefault(int(glyph.line // patch), []).append((glyph.cx, CLASSES[glyph.char]))
    labels = torch.zeros(rows, columns, SLOTS, dtype=torch.int64)
    for row, line in lines.items():
        if not 0 <= row < rows:
            continue
        before, before_column = 0, -columns
        for column, chars in itertools.groupby(sorted(line), key=lambda placed: int(placed[0] // patch)):
            found = [char for _, char in chars]
            if 0 <= column < columns:
                labels[row, column, : min(HELD, len(found))] = torch.tensor(found[:HELD])
                labels[row, column, HELD] = before if column - before_column <= REACH_LEFT else 0
            before, before_column = found[-1], column
    return labels


def coverage_map(sample: Sample) -> Tensor:
    """[canvas height / 4, canvas width / 4] int64: the class of the character over each cell, 0 for none.

    A character covers the cells whose centre lies within `REACH` heights of a capital of its own; the nearer of two
    along x wins.
    """
    height, width = sample.canvas[0] // COVER, sample.canvas[1] // COVER
    covered = torch.zeros(height, width, dtype=torch.int64)
    distance = torch.full((height, width), float("inf"))
    for glyph in sample.glyphs:
        if glyph.char == " ":
            continue
        rows, columns = (
            range(max(0, math.ceil((c - reach) / COVER - 0.5)), min(size, math.floor((c + reach) / COVER + 0.5)))
            for c, reach, size in ((glyph.cy, REACH[0] * glyph.cap, height), (glyph.cx, REACH[1] * glyph.cap, width))
        )
        for column in columns:
            away = abs((column + 0.5) * COVER - glyph.cx)
            for row in rows:
                if away < distance[row, column]:
                    distance[row, column], covered[row, column] = away, CLASSES[glyph.char]
    return covered


def view_labels(characters: Tensor, layout: Layout) -> Tensor:
    """[V, N, S]: the character map as the views see it.

    The global view is unreadable and carries `IGNORE`.
    """
    grid = layout.geometry.grid
    if not layout.rows:
        return characters.reshape(1, grid * grid, SLOTS)
    tiles = characters.view(layout.rows, grid, layout.columns, grid, SLOTS).permute(0, 2, 1, 3, 4)
    tiles = tiles.reshape(layout.rows * layout.columns, grid * grid, SLOTS)
    return torch.cat([torch.full_like(tiles[:1], IGNORE), tiles])


def conversation(
    sample: Sample, num_image_tokens: int, tokenizer: PreTrainedTokenizerBase, transcribe: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids and labels of everything asked about a page, as turns of the chat template, and where answers begin.

    Only answers and their `<eos>` are learned. The picture comes once, in the first turn; the page's transcript, where
    it is asked for, comes last, where no question can be answered from it.
    """
    ids = [tokenizer.bos_token_id]
    labels = [IGNORE]
    starts = []
    turns = [(asked.question, asked.answer) for asked in sample.asked]
    if transcribe:
        turns.append((TRANSCRIBE, LINE_BREAK.join(sample.lines)[:LONGEST_TRANSCRIPT]))
    for turn, (question, answer) in enumerate(turns):
        picture = IMAGE * num_image_tokens if turn == 0 else ""
        asked = tokenizer.encode(USER + picture + question + ASSISTANT, add_special_tokens=False)
        said = tokenizer.encode(answer + EOS, add_special_tokens=False)
        starts.append(len(ids) + len(asked))
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return torch.tensor(ids), torch.tensor(labels), starts[: len(sample.asked)]


@dataclass
class Page:
    """One training example; see the module's legend for shapes. Pictures are None in text-only stages.

    `kinds` names the kind of each of its questions; a transcript, where there is one, comes after them.
    """

    size: tuple[int, int]
    layout: Layout
    characters: Tensor
    coverage: Tensor
    input_ids: Tensor
    labels: Tensor
    guides: Guides
    kinds: list[str]
    pixel_values: Tensor | None
    high_res_pixel_values: Tensor | None


@dataclass
class PageBatch:
    """Pages put together: keyword arguments for `FilaForConditionalGeneration`, layouts and character maps."""

    inputs: dict[str, Tensor]
    labels: Tensor
    layouts: list[Layout]
    characters: list[Tensor]
    coverage: list[Tensor]
    guides: list[Guides]
    kinds: list[list[str]]


class Pages(Dataset):
    """Generated pages, page i of seed s being the same on every machine.

    Args:
        processor, tokenizer: those of the model being trained.
        geometry: the layout rules, the processor's.
        fonts: faces of the split.
        split: "train" or "test": its words and labels.
        seed: added to the index.
        length: number of pages.
        render: whether pictures are drawn; a text-only stage needs none.
        shares: kinds of pages and how often each comes, see `recipes.nano.pages.sources`.
        absent: share of the questions that ask for what the page does not hold.
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
        shares: dict[str, float],
        absent: float = 0.0,
    ):
        self.processor, self.tokenizer, self.geometry, self.fonts = processor, tokenizer, geometry, fonts
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE)
        self.split, self.seed, self.length, self.render, self.shares = split, seed, length, render, shares
        self.absent = absent

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Page:
        sample = draw(
            self.seed + index,
            self.shares,
            split=self.split,
            fonts=self.fonts,
            geometry=self.geometry,
            render=self.render,
            absent=self.absent,
        )
        return self.page(sample, transcribe=index % TRANSCRIBED == 0)

    def page(self, sample: Sample, transcribe: bool = False) -> Page:
        """Turns a generated sample into tensors."""
        layout = self.geometry.layout(*sample.size)
        input_ids, labels, starts = conversation(sample, layout.num_tokens, self.tokenizer, transcribe)
        pixels = raster = None
        if self.render:
            features = self.processor(sample.image, return_tensors="pt")
            pixels, raster = features["pixel_values"][0], features["high_res_pixel_values"][0]
        characters = character_map(sample, self.geometry.patch)
        guide = guides(sample, layout, input_ids.tolist().index(self.image_token), starts)
        kinds = [asked.kind for asked in sample.asked]
        return Page(
            sample.size, layout, characters, coverage_map(sample), input_ids, labels, guide, kinds, pixels, raster
        )


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
    return PageBatch(
        inputs,
        labels,
        [p.layout for p in pages],
        [p.characters for p in pages],
        [p.coverage for p in pages],
        [p.guides for p in pages],
        [p.kinds for p in pages],
    )


def _pad(tensors: list[Tensor], value: float) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    out = tensors[0].new_full((len(tensors), *shape), value)
    for row, tensor in zip(out, tensors, strict=True):
        row[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


class Batches(Dataset):
    """The batches of a run, by step.

    Pages are drawn for `TOGETHER` batches at a time and sorted, so that a batch holds pages of like canvas and length
    and little of it is padding.

    Args:
        batch: pages per step.
        rank, world: which process takes its share of every batch, and how many there are.
    """

    def __init__(self, pages: Pages, batch: int, rank: int = 0, world: int = 1):
        self.pages, self.batch, self.rank, self.world = pages, batch, rank, world
        self.drawn: tuple[int, list[Page]] = (-1, [])

    def __len__(self) -> int:
        return len(self.pages) // self.batch

    def __getitem__(self, step: int) -> PageBatch:
        group = step // TOGETHER
        if self.drawn[0] != group:
            first = group * TOGETHER * self.batch
            drawn = [self.pages[i] for i in range(first, min(first + TOGETHER * self.batch, len(self.pages)))]
            drawn.sort(key=lambda page: (page.layout.canvas if self.pages.render else (), len(page.input_ids)))
            self.drawn = group, drawn
        start = step % TOGETHER * self.batch
        share = self.drawn[1][start : start + self.batch][self.rank :: self.world]
        return collate(share, self.pages.tokenizer.pad_token_id)


def loader(batches: Batches, start: int, workers: int = 1) -> DataLoader:
    """The batches from step `start` on, drawn ahead in worker processes; several of them draw the same pages."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, len(batches)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )

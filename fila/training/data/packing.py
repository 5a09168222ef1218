"""Packs records into rows of a fixed length without cross-talk, and makes tensors of rows without any padded tile.

A *lane* is one row's place in every step. Its records are a function of the seed, its number and how many lanes a step
has, not of processes or workers: rank r of w takes lanes r, r + w, ... . A lane keeps a pool of records; a row holds
the oldest of the pool and, beside it, the choice that fills the row best.

transformers sees that a row is packed by position ids that restart, and only **without** an attention mask and with
`use_cache=False` on the text configuration (`fila.training.build.prepare` sets that). With either, records of a row
attend to each other in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fila.training.data.conversation import IGNORE, Encoded, Encoder
from fila.training.data.order import Order
from fila.training.data.sources import Source
from fila.training.errors import RecordError, TrainingError

POOL = 128  # records that a row is chosen from
CHUNK = 32  # consecutive places of the order that one lane takes: records that are read together stay together
MOST_BROKEN = 1000  # one after the other; then the corpus is another one than meant


def choose(lengths: Sequence[int], room: int) -> list[int]:
    """Positions of the lengths that fill the room best, the first among them always; the older ones among equals.

    Example:
        >>> choose([5, 7, 4, 3, 1], 10)
        [0, 2, 4]
    """
    room -= lengths[0]
    mask = (1 << room + 1) - 1
    reached = [1]  # bit s: some of the lengths so far add up to s
    for length in lengths[1:]:
        reached.append(reached[-1] | reached[-1] << length & mask)
    left = reached[-1].bit_length() - 1
    chosen = []
    for i in range(len(lengths) - 1, 0, -1):
        if not reached[i - 1] >> left & 1:
            chosen.append(i)
            left -= lengths[i]
    return [0, *reversed(chosen)]


@dataclass
class Corpus:
    """Sources in their order, read and encoded by place.

    Attributes:
        length: the longest row, tokens; a longer record is broken.
        stop_at_broken: whether a broken record ends the run; else it is skipped, counted and listed.
    """

    sources: Sequence[Source]
    order: Order
    encoder: Encoder
    length: int
    stop_at_broken: bool = False

    def encode(self, place: int) -> Encoded:
        """The record at a place of the order; `RecordError` where it cannot be used."""
        source, index = self.order.at(place)
        encoded = self.encoder.encode(self.sources[source].record(index))
        if len(encoded) > self.length:
            raise RecordError(
                f"{encoded.record.name}: expected at most {self.length} tokens, got {len(encoded)}", "too long"
            )
        return encoded


@dataclass
class Plan:
    """The records of one row (packed), or of one row each, and what was broken on the way."""

    records: list[Encoded]
    broken: list[str]


@dataclass
class Lane:
    """One lane's rows, one after the other.

    `next` and the numbers of the pool's records are its whole state (`cursor`).

    Args:
        number, count: which lane, of how many.
        rows: 0 packs records into one row; else that many records stand in a row of their own each.
        cursor: the state to go on from.
    """

    corpus: Corpus
    number: int
    count: int
    rows: int = 0
    cursor: dict[str, Any] | None = None
    _pool: list[tuple[int, Encoded]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        state = self.cursor or {"next": 0, "pool": []}
        self._next = int(state["next"])
        self._pool = [(n, self.corpus.encode(self._place(n))) for n in state["pool"]]

    def _place(self, n: int) -> int:
        chunk, within = divmod(n, CHUNK)
        return (chunk * self.count + self.number) * CHUNK + within

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "pool": [n for n, _ in self._pool]}

    def plan(self) -> Plan:
        """The next row's records."""
        broken: list[str] = []
        while len(self._pool) < (self.rows or POOL):
            n, self._next = self._next, self._next + 1
            try:
                self._pool.append((n, self.corpus.encode(self._place(n))))
            except RecordError as error:
                note_broken(broken, error, self.corpus.stop_at_broken)
        chosen = list(range(self.rows)) or choose([len(record) for _, record in self._pool], self.corpus.length)
        records = [self._pool[i][1] for i in chosen]
        taken = set(chosen)
        self._pool = [entry for i, entry in enumerate(self._pool) if i not in taken]
        return Plan(records, broken)


def note_broken(broken: list[str], error: RecordError, stop: bool) -> None:
    broken.append(str(error))
    if stop:
        raise TrainingError(f"broken record: {error} (data.broken: skip would leave it out)") from error
    if len(broken) >= MOST_BROKEN:
        raise TrainingError(
            f"expected a corpus with records, got {MOST_BROKEN} broken ones in a row: {error}"
        ) from error


def tensors(records: Sequence[Encoded], image_processor: Any, pad_id: int, packed: bool) -> dict[str, Any]:
    """Model inputs of some records, pictures read and drawn; no attention mask, see the module's docstring.

    Args:
        packed: whether the records stand in one row, [1, total]; else each has a row, padded on the right, where causal
            attention never looks back from.

    Returns:
        `input_ids`, `labels`, `position_ids`, and where there are pictures `pixel_values` [views of all, 3, tile,
        tile], `image_sizes` [n_images, 2] and `high_res_pixel_values`, a list of [3, height, width].

    Raises:
        RecordError: a picture that cannot be decoded.
    """
    if packed:
        ids, labels = (np.concatenate([getattr(r, name) for r in records])[None] for name in ("input_ids", "labels"))
        positions = np.concatenate([np.arange(len(r)) for r in records])[None]
    else:
        longest = max(len(r) for r in records)
        ids, labels = (
            np.stack([np.pad(getattr(r, n), (0, longest - len(r)), constant_values=v) for r in records])
            for n, v in (("input_ids", pad_id), ("labels", IGNORE))
        )
        positions = np.broadcast_to(np.arange(longest), ids.shape).copy()
    batch: dict[str, Any] = {
        name: torch.from_numpy(value.astype(np.int64))
        for name, value in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
    }
    views: list[Tensor] = []
    rasters: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for record in records:
        for picture, size in zip(record.record.pictures, record.sizes, strict=True):
            read = picture.read()
            if read.size != size:
                message = f"{record.record.name}: its header says {size}, it is {read.size}"
                raise RecordError(message, "broken picture")
            drawn = image_processor(read, return_tensors="pt")
            views.append(drawn["pixel_values"][0])
            rasters += list(drawn.get("high_res_pixel_values", ()))
            sizes.append(size)
    if sizes:
        batch |= {"pixel_values": torch.cat(views), "image_sizes": torch.tensor(sizes)}
        if rasters:
            batch["high_res_pixel_values"] = rasters
    return batch

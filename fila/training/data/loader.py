"""Gives a process its micro-batches: rows planned, pictures decoded and drawn in worker processes, ahead of the step.

Micro-batch n of a process is of its lane n modulo their number, so that one round of the lanes is one step. Workers
take micro-batches in turn. Each plans every lane that it meets and decodes its own rows alone, so their number changes
nothing; it costs least where it divides the process's lanes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fila.training.data.conversation import IGNORE
from fila.training.data.packing import Corpus, Encoded, Lane, note_broken, tensors
from fila.training.errors import RecordError

AHEAD = 4  # micro-batches that a worker prepares


@dataclass
class MicroBatch:
    """What one forward pass takes, and what the run's record says of it.

    Attributes:
        inputs: keyword arguments of the model.
        lane, cursor: whose row it is, and the lane's state behind it.
        names: records in it.
        broken: records that were left out before or in it, with the reason.
        lengths, room: tokens of each record, and what the row (or the rows) would hold.
        sizes: height and width of each picture, image pixels.
    """

    inputs: dict[str, Any]
    lane: int
    cursor: dict[str, Any]
    names: list[str]
    broken: list[str]
    lengths: list[int]
    room: int
    sizes: list[tuple[int, int]]


class Rows(IterableDataset):
    """The micro-batches of one process, without end.

    Args:
        lanes: the process's own lanes, of `num_lanes` in all.
        rows: as in `Lane`.
        cursors: states of the lanes to go on from, by number.
    """

    def __init__(
        self,
        corpus: Corpus,
        image_processor: Any,
        pad_id: int,
        lanes: Sequence[int],
        num_lanes: int,
        rows: int = 0,
        cursors: Mapping[int, dict[str, Any]] | None = None,
    ):
        self.corpus, self.image_processor, self.pad_id = corpus, image_processor, pad_id
        self.numbers, self.num_lanes, self.rows, self.cursors = list(lanes), num_lanes, rows, dict(cursors or {})

    def __iter__(self) -> Iterator[MicroBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # A worker meets the lanes that stand at its own micro-batches: every so many-th.
        step = math.gcd(workers, len(self.numbers))
        lanes = {
            number: Lane(self.corpus, number, self.num_lanes, self.rows, self.cursors.get(number))
            for i, number in enumerate(self.numbers)
            if i % step == worker % step
        }
        n = 0
        while True:
            lane = lanes.get(self.numbers[n % len(self.numbers)])
            if lane is not None:
                plan = lane.plan()
                if n % workers == worker:
                    yield self.make(lane, plan.records, plan.broken)
            n += 1

    def make(self, lane: Lane, records: Sequence[Encoded], broken: list[str]) -> MicroBatch:
        """Reads the pictures; a record whose picture cannot be decoded leaves the row, which is then shorter."""
        kept = list(records)
        while True:
            try:
                inputs = tensors(kept, self.image_processor, self.pad_id, packed=not self.rows)
                break
            except RecordError as error:
                note_broken(broken, error, self.corpus.stop_at_broken)
                kept = [record for record in kept if _decodes(record)]
                if (
                    not kept
                ):  # what a row holds must not depend on who decoded it, so that the next cannot take its place
                    inputs = nothing(self.pad_id)
                    break
        room = self.corpus.length if not self.rows else inputs["input_ids"].numel()
        return MicroBatch(
            inputs,
            lane.number,
            lane.state(),
            [record.record.name for record in kept],
            broken,
            [len(record) for record in kept],
            room,
            [size for record in kept for size in record.sizes],
        )


def nothing(pad_id: int) -> dict[str, Any]:
    """A row of one token that is not learned."""
    return {
        "input_ids": torch.tensor([[pad_id]]),
        "labels": torch.tensor([[IGNORE]]),
        "position_ids": torch.tensor([[0]]),
    }


def _decodes(record: Encoded) -> bool:
    try:
        return all(
            picture.read().size == size for picture, size in zip(record.record.pictures, record.sizes, strict=True)
        )
    except RecordError:
        return False


def _as_it_is(item: Any) -> Any:
    return item


def make_loader(rows: Rows, workers: int) -> DataLoader:
    """The micro-batches, prepared in that many processes; 0 prepares them in this one."""
    return DataLoader(
        rows,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
    )

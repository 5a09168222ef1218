"""Orders a mixture: which record stands at a place is a function of the seed and the place, and takes no pass.

A block of `BLOCK` places holds each source in its share, shuffled. Records of a source come in a permutation per epoch
(a Feistel network over its numbers, so that none is stored); records that are read together, as in a parquet row group,
stay together: their groups are permuted, then the records within each.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fila.training.errors import TrainingError

BLOCK = 1000
ROUNDS = 4
WORD = (1 << 64) - 1


def mix(*values: int) -> int:
    """64 well mixed bits of some whole numbers (splitmix64's finaliser)."""
    x = 0
    for value in values:
        x = (x ^ value) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15 & WORD
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
        x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
        x ^= x >> 31
    return x


def permuted(index: int, count: int, key: int) -> int:
    """The place of `index` in a permutation of `range(count)` that `key` names."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:  # the network permutes a power of four; what falls outside goes through it again
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ mix(key, turn, right) & mask
        index = left << half | right
        if index < count:
            return index


class Order:
    """The endless order of a mixture.

    Args:
        sizes: records of each source.
        groups: of each source, the sizes of the groups of records that are read together, or None.
        weights: shares of the sources; in proportion to their sizes where None.
        seed: another seed is another order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        groups: Sequence[Sequence[int] | None],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ):
        shares = list(weights or sizes)
        if min(shares) <= 0:
            raise TrainingError(f"weights: expected positive numbers, got {shares}")
        if len(shares) > BLOCK:
            raise TrainingError(f"expected at most {BLOCK} sources, got {len(shares)}")
        self.sizes, self.groups, self.seed = list(sizes), list(groups), seed
        self.counts = _counts(shares)
        self.starts = [None if sizes is None else list(accumulate(sizes, initial=0)) for sizes in self.groups]

    @lru_cache(maxsize=8)  # noqa: B019 (an order lives as long as its run)
    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place of a block, and how many of that source stand before it in the block."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng((self.seed, number)).shuffle(sources)
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, count in enumerate(self.counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks

    @lru_cache(maxsize=64)  # noqa: B019
    def _grouped(self, source: int, epoch: int) -> tuple[list[int], list[int]]:
        """Groups of an epoch in their order, and the place at which each ends."""
        sizes = self.groups[source]
        assert sizes is not None
        order = [permuted(i, len(sizes), mix(self.seed, source, epoch)) for i in range(len(sizes))]
        return order, list(accumulate(sizes[group] for group in order))

    def at(self, place: int) -> tuple[int, int]:
        """Source and record at a place of the order."""
        block, within = divmod(place, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[within])
        epoch, index = divmod(block * self.counts[source] + int(ranks[within]), self.sizes[source])
        sizes = self.groups[source]
        if sizes is None:
            return source, permuted(index, self.sizes[source], mix(self.seed, source, epoch))
        order, ends = self._grouped(source, epoch)
        i = bisect_right(ends, index)
        group, start = order[i], ends[i] - sizes[order[i]]
        inner = permuted(index - start, sizes[group], mix(self.seed, source, epoch, group))
        starts = self.starts[source]
        assert starts is not None
        return source, starts[group] + inner


def _counts(shares: Sequence[float]) -> list[int]:
    """Places of each source in a block: largest remainders, and at least one place each."""
    exact = [share / sum(shares) * BLOCK for share in shares]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != BLOCK:
        step = 1 if sum(counts) < BLOCK else -1
        able = [i for i in range(len(counts)) if counts[i] + step >= 1]
        i = max(able, key=lambda i: step * (exact[i] - counts[i]))
        counts[i] += step
    return counts

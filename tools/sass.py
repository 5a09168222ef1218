"""Reads a kernel's machine code as a graph of basic blocks and counts the instructions that a warp issues.

`Code(text)` takes what `nvdisasm -c` prints. Its loops form a tree; `Code.count` adds up the longest (or shortest) way
through it, a loop's way as often as the caller says. An instruction takes one issue slot whether or not its predicate
holds.

Calls are left out: they are the slow paths of divisions in double precision, which ordinary numbers do not take. So
are loops that only wait for a barrier (`Loop.waits`), and the padding behind the last instruction.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+|\$[\w$.]+|\w+):", re.MULTILINE)
_TARGET = re.compile(r"`\(([^)]+)\)")
_WAITS = ("SYNCS", "NANOSLEEP", "BRA", "YIELD", "NOP")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    predicated: bool
    target: str | None


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)

    @property
    def calls(self) -> bool:
        return any(one.name.startswith("CALL") for one in self.instructions)


@dataclass(eq=False)
class Loop:
    """The blocks between a loop's head and the branches back to it; `inner` are the loops inside, in their order."""

    head: int
    blocks: frozenset[int]
    inner: list["Loop"] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)

    def has(self, *prefixes: str) -> int:
        """The number of instructions, inner loops included, whose name begins with one of these."""
        return sum(number for name, number in self.names.items() if name.startswith(prefixes))

    @property
    def waits(self) -> bool:
        """Whether it does nothing but wait."""
        return self.has(*_WAITS) == self.names.total()


Trips = Callable[[Loop], float]


class Code:
    """A kernel's basic blocks and loops."""

    def __init__(self, text: str) -> None:
        body = text[text.index(".text.") :]
        at_label: dict[str, int] = {}
        found: list[Instruction] = []
        waiting: list[str] = []
        for line in body.splitlines():
            if label := _LABEL.match(line):
                waiting.append(label[1])
            elif one := _LINE.match(line):
                target = _TARGET.search(one[4])
                found.append(Instruction(int(one[1], 16), one[3], one[2] is not None, target[1] if target else None))
                at_label.update(dict.fromkeys(waiting, len(found) - 1))
                waiting = []
        self.instructions = found
        self.blocks = self._blocks(at_label)

    def _blocks(self, at_label: dict[str, int]) -> list[Block]:
        ends = ("BRA", "EXIT", "RET", "CALL")
        starts = {0, *(index for index in at_label.values())}
        starts |= {i + 1 for i, one in enumerate(self.instructions) if one.name.startswith(ends)}
        ordered = sorted(start for start in starts if start < len(self.instructions))
        number = {start: i for i, start in enumerate(ordered)}
        blocks = [
            Block(self.instructions[a:b]) for a, b in zip(ordered, [*ordered[1:], len(self.instructions)], strict=True)
        ]
        for i, block in enumerate(blocks):
            last = block.instructions[-1]
            jumps = last.name.startswith("BRA") and last.target in at_label
            if jumps:
                block.after.append(number[at_label[last.target or ""]])
            falls = last.predicated or not last.name.startswith(("BRA", "EXIT", "RET"))
            if falls and i + 1 < len(blocks):
                block.after.append(i + 1)
        return blocks

    @cached_property
    def _reached(self) -> list[int]:
        """Blocks that the entry leads to, calls left out."""
        seen, left = {0}, [0]
        while left:
            for after in self.blocks[left.pop()].after:
                if after not in seen and not self.blocks[after].calls:
                    seen.add(after)
                    left.append(after)
        return sorted(seen)

    @cached_property
    def _before(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {block: [] for block in self._reached}
        for block in self._reached:
            for after in self.blocks[block].after:
                if after in before:
                    before[after].append(block)
        return before

    @cached_property
    def loops(self) -> Loop:
        """The whole kernel as a loop of one trip, with its loops inside."""
        every = frozenset(self._reached)
        dominators = dict.fromkeys(every, every)
        dominators[0] = frozenset({0})
        changed = True
        while changed:
            changed = False
            for block in self._reached[1:]:
                new = frozenset.intersection(*(dominators[b] for b in self._before[block])) | {block}
                changed, dominators[block] = changed or new != dominators[block], new
        bodies: dict[int, set[int]] = {}
        for block in self._reached:
            for head in self.blocks[block].after:
                if head in dominators[block]:
                    body = bodies.setdefault(head, {head})
                    left = [block]
                    while left:
                        if (one := left.pop()) not in body:
                            body.add(one)
                            left.extend(self._before[one])
        root = Loop(-1, every)
        for head, body in sorted(bodies.items(), key=lambda item: -len(item[1])):
            self._nest(root, Loop(head, frozenset(body)))
        return self._named(root)

    def _nest(self, parent: Loop, loop: Loop) -> None:
        for inner in parent.inner:
            if loop.blocks <= inner.blocks:
                return self._nest(inner, loop)
        parent.inner.append(loop)
        parent.inner.sort(key=lambda one: one.head)
        return None

    def _named(self, loop: Loop) -> Loop:
        for inner in loop.inner:
            self._named(inner)
        loop.names = Counter(one.name for block in loop.blocks for one in self.blocks[block].instructions)
        return loop

    def count(self, trips: Trips, loop: Loop | None = None, longest: bool = True, prefix: str = "") -> float:
        """Instructions of one trip through `loop` (the kernel if None) whose names begin with `prefix`.

        Inner loops count `trips(inner)` times on the ways that lead through them. The way is the longest, or the
        shortest, by the number of all its instructions.
        """
        return self._way(loop or self.loops, trips, longest, prefix)[1]

    def _way(self, loop: Loop, trips: Trips, longest: bool, prefix: str) -> tuple[float, float]:
        """All instructions on the way, and those that are asked for."""
        owner = {block: inner for inner in loop.inner for block in inner.blocks}
        weights: dict[int | Loop, tuple[float, float]] = {}

        def node(block: int) -> int | Loop:
            return owner.get(block, block)

        def weight(one: int | Loop) -> tuple[float, float]:
            if one not in weights:
                if isinstance(one, Loop):
                    times = 0.0 if one.waits else trips(one)
                    every, wanted = self._way(one, trips, longest, prefix) if times else (0.0, 0.0)
                    weights[one] = times * every, times * wanted
                else:
                    names = [instruction.name for instruction in self.blocks[one].instructions]
                    weights[one] = len(names), sum(name.startswith(prefix) for name in names)
            return weights[one]

        after: dict[int | Loop, set[int | Loop]] = {}
        for block in loop.blocks:
            kept = {b for b in self.blocks[block].after if b in loop.blocks and b != loop.head}
            after.setdefault(node(block), set()).update(node(b) for b in kept)
        done: dict[int | Loop, tuple[float, float]] = {}

        def best(one: int | Loop) -> tuple[float, float]:
            if one not in done:
                ways = [best(next_one) for next_one in after[one] if next_one is not one]
                ways = [way for way in ways if way[0] < float("inf")]
                rest = (max if longest else min)(ways, default=(0.0, 0.0))
                own = weight(one)
                done[one] = own[0] + rest[0], own[1] + rest[1]
            return done[one]

        return best(node(max(loop.head, 0)))

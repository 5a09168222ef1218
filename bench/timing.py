"""Interleaved rounds: every variant once a round, in an order that rotates, so that what disturbs one disturbs all.

A round of a variant is one or more calls that go through its sets of buffers in turn. On a GPU there are enough sets
that the second-level cache has forgotten the first when its turn comes again, and a round is long enough for events.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Call = Callable[[], object]
SHORTEST_ROUND = 2e-3  # seconds; a CUDA event resolves half a microsecond, and a start costs a launch
CACHE_MULTIPLE = 8  # bytes of all sets together, over those of the second-level cache
MOST_SETS = 32


def num_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs to rotate: one on a CPU, whose caches hold a small part of a call's own traffic."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, -(-CACHE_MULTIPLE * cache // set_bytes)))


class Runner:
    """One variant, bound to its sets of buffers."""

    def __init__(self, calls: list[Call], device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.calls, self.device, self.now = calls, device, now
        self.size = len(calls)
        self.repeats = 1
        self._warm()

    def _warm(self) -> None:
        self.first_seconds = self._wall(self.calls[0])
        if self.device.type == "cuda":
            self.repeats = max(1, round(SHORTEST_ROUND / max(self.round() * self.size, 1e-7)))

    def _wall(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _pass(self) -> None:
        for call in self.calls:
            call()

    def round(self) -> float:
        """Seconds a call, over one round."""
        count = self.repeats * self.size
        if self.device.type != "cuda":
            start = self.now()
            for _ in range(self.repeats):
                self._pass()
            return (self.now() - start) / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.repeats):
            self._pass()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    def host_seconds(self, rounds: int = 5) -> float:
        """Seconds until a call returns to Python, the device idle before: the lowest of some, since waits only add."""
        times = []
        for _ in range(rounds):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            self.calls[0]()
            times.append(time.perf_counter() - start)
        return min(times)


class GraphRunner(Runner):
    """The calls on all sets captured as one CUDA graph, so that a round is one launch or more.

    Runners that share a `pool` of memory must not depend on what another one left there; these do not, since nobody
    looks at their results.
    """

    def __init__(self, calls: list[Call], device: torch.device, pool: Any = None) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                calls[0]()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            for call in calls:
                call()
        self.device, self.now = device, time.perf_counter
        self.calls, self.size, self.repeats = [self.graph.replay], len(calls), 1
        self._warm()


def interleaved(runners: dict[str, Runner]) -> Callable[[], dict[str, float]]:
    """A function that runs one round of every runner and returns each one's seconds a call."""
    order = list(runners)

    def run() -> dict[str, float]:
        order.append(order.pop(0))
        return {name: runners[name].round() for name in order}

    return run


def quantile(times: Iterable[float], part: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

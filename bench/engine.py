"""The measuring engine: contestants are judged first, then timed in turns over buffers that rotate past the caches.

A contestant that is wrong or fails is left out with the reason, and the others go on. A round runs every contestant
once, in an order that rotates, so that a disturbance slows all alike. A contestant's round is one or more passes over
its sets of buffers. On a GPU there are enough sets that the second-level cache has forgotten the first when its turn
comes again, and a round is long enough for CUDA events.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.verify import Verdict
from bench.workloads import Work

Step = Callable[[], Any]
Watch = Callable[[str], None]  # told the contestant whose turn begins
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
SHORTEST_ROUND = 2e-3  # seconds; a CUDA event resolves half a microsecond, and starting a round costs a launch
CACHE_MULTIPLE = 8  # bytes of all sets of buffers, over those of the second-level cache
MOST_SETS = 32


def nobody(name: str) -> None:
    """The watch of a run that no other process looks after."""


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def num_sets(set_bytes: int, device: torch.device) -> int:
    """The number of sets of buffers that rotate; one on a CPU, whose caches hold a small part of one call's traffic."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, -(-CACHE_MULTIPLE * cache // set_bytes)))


class Runner:
    """Calls on every set of buffers, timed as one round. `clock` is for CPU calls; a GPU's are timed by events."""

    def __init__(self, calls: Sequence[Step], device: torch.device, clock: str = "wall", size: int = 0) -> None:
        self.calls, self.device, self.now = list(calls), device, CLOCKS[clock]
        self.size = size or len(calls)  # calls that one pass stands for
        self.repeats = 1
        self.calls[0]()
        if device.type == "cuda":
            self.repeats = max(1, round(SHORTEST_ROUND / max(self.round() * self.size, 1e-7)))

    def _passes(self) -> None:
        for _ in range(self.repeats):
            for call in self.calls:
                call()

    def round(self) -> float:
        """Seconds per call, over one round."""
        count = self.repeats * self.size
        if self.device.type != "cuda":
            begin = self.now()
            self._passes()
            return (self.now() - begin) / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._passes()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count


class GraphRunner(Runner):
    """The calls on all sets captured as one CUDA graph.

    Runners may share a `pool` of memory, since nobody reads their results.
    """

    def __init__(self, calls: Sequence[Step], device: torch.device, pool: Any = None) -> None:
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
        super().__init__([self.graph.replay], device, size=len(calls))


def in_turns(runners: dict[Any, Runner], rounds: int, watch: Watch = nobody) -> dict[Any, list[float]]:
    """Seconds per call of every runner in every round; one more round comes first and does not count."""
    order = list(runners)
    seconds: dict[Any, list[float]] = {name: [] for name in runners}
    for _ in range(rounds + 1 if runners else 0):
        order.append(order.pop(0))
        for name in order:
            watch(name)
            seconds[name].append(runners[name].round())
    return {name: taken[1:] for name, taken in seconds.items()}


def quantile(times: Iterable[float], part: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def wall_seconds(call: Step, device: torch.device, wait: bool = True) -> float:
    """One call on the wall clock, on a GPU until its work is done, or until it returns if not `wait`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


# On a CPU VmHWM is the meter, reset through /proc/self/clear_refs: it counts all allocators (torch's, oneDNN's scratch,
# calloc) and only pages that are touched. Linux only.
METERS = {
    "cpu": "growth of VmHWM over one call after clear_refs, bytes",
    "cuda": "growth of the allocator's peak over one call, bytes",
}


def extra_memory(call: Step, device: torch.device) -> int:
    """Bytes by which one call lifts the peak of memory in use, its result included."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def kept_for_backward(forward: Callable[[], Tensor], inputs: Iterable[Any]) -> int:
    """Bytes that autograd holds between a forward pass and its backward pass, beside the inputs and the result."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in (*inputs, out):
        if isinstance(tensor, Tensor):
            saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@dataclass
class Contestant:
    """One way to compute a comparison's result."""

    name: str
    bind: Callable[[int], Step]  # the call on one set of buffers, by its number
    ours: bool = False
    graph: bool = False  # timed as a CUDA graph
    gated: bool = True  # False for what computes something else on purpose
    judged: Step | None = None  # what the gate looks at, if it is not the result of `bind(0)`
    kept: Callable[[], int] | None = None  # bytes kept for the backward pass


@dataclass
class Comparison:
    """One operation on one workload in one direction: the contestants, their gate, and the work to be done."""

    operation: str
    workload: str
    direction: str
    dtype: str
    contestants: list[Contestant]
    gate: Callable[[], Callable[[Contestant, Any], Verdict]]  # made when judging begins, since it holds large tensors
    sets: int = 1
    work: Work | None = None  # of the definition
    ways: Sequence[Work] = ()  # the exact ways to do it, of which the fastest one on the roof is the floor


@dataclass
class Result:
    """The measurements of one contestant; `seconds` is empty where nothing was timed, and `note` says why."""

    first_seconds: float | None = None
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    host_seconds: float | None = None
    extra_memory: int | None = None
    kept: int | None = None
    note: str = ""


class Red(Exception):
    """A variant of this package differs from the definition or fails."""


def alive(device: torch.device) -> bool:
    """Whether the device takes further work: after an illegal access every call of the process fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def judge(comparison: Comparison, device: torch.device, watch: Watch = nobody) -> dict[str, Result]:
    """Run every contestant once and hold its result against the definition; what is wrong or fails gets a note.

    A failure that leaves the device unusable is raised as it is: this process can measure nothing more.
    """
    gate = comparison.gate()
    results: dict[str, Result] = {}
    for each in comparison.contestants:
        watch(each.name)
        result = results[each.name] = Result()
        outputs: list[Any] = []
        try:
            call = each.bind(0)
            result.first_seconds = wall_seconds(lambda: outputs.append(call()), device)  # noqa: B023
            if each.gated:
                verdict = gate(each, each.judged() if each.judged else outputs[0])
                result.error = verdict.error
                if not verdict.green:
                    result.note = f"red: {verdict.worst}"
        except Exception as error:
            result.note = _reason(each, error, device)
    return results


def _reason(contestant: Contestant, error: Exception, device: torch.device) -> str:
    if not alive(device):
        raise error
    return f"failed: {_one_line(error)}" if contestant.ours and not out_of_memory(error) else _one_line(error)


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def compare(
    comparison: Comparison, device: torch.device, rounds: int, clock: str = "wall", watch: Watch = nobody
) -> dict[str, Result]:
    """Check every contestant, then time those that passed in interleaved rounds. Raises as `judge`."""
    results = judge(comparison, device, watch)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    runners: dict[str, Runner] = {}
    for each in comparison.contestants:
        if not results[each.name].note:
            watch(each.name)
            try:
                calls = [each.bind(index) for index in range(comparison.sets)]
                runners[each.name] = GraphRunner(calls, device) if each.graph else Runner(calls, device, clock)
            except Exception as error:
                reason = _reason(each, error, device)
                # A call that synchronises cannot be captured, which is no fault.
                results[each.name].note = f"no graph: {_one_line(error)}" if each.graph else reason
    for name, seconds in in_turns(runners, rounds, watch).items():
        results[name].seconds = seconds
    for each in comparison.contestants:
        if each.name in runners:
            watch(each.name)
            _inspect(each, results[each.name], device)
    return results


def _inspect(contestant: Contestant, result: Result, device: torch.device) -> None:
    """Fill in what needs calls of its own: memory, and on a GPU the host's time."""
    if contestant.graph:
        return
    call = contestant.bind(0)
    if device.type == "cuda":
        result.host_seconds = min(wall_seconds(call, device, wait=False) for _ in range(5))
    result.extra_memory = extra_memory(call, device)
    if contestant.kept is not None:
        try:
            result.kept = contestant.kept()
        except Exception as error:  # compiled functions may refuse autograd's hooks
            result.note = f"kept_bytes: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def run_benchmark(benchmark: Callable, comparison: Comparison, device: torch.device) -> None:
    """Judge a comparison's only contestant, then time it by pytest-benchmark's own clock.

    Raises:
        Red: it differs from the definition or fails.
    """
    (contestant,) = comparison.contestants
    result = judge(comparison, device)[contestant.name]
    if result.note:
        raise Red(f"{comparison.operation}, {comparison.workload}, {comparison.direction}: {result.note}")
    call = contestant.bind(0)
    benchmark(call if device.type != "cuda" else lambda: (call(), torch.cuda.synchronize(device)))

"""The goals on a GPU, and what a CSV says about each; docs/benchmarks.md is filled from here.

This package's time is that of its fastest backend with the planner's plan, torch.compile's that of its fastest variant,
the expert's that of `library` or, where it is installed, `quack`. Sums over stages are sums of medians.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.records import Row
from bench.variants import BACKENDS

EAGER = ("tuned_eager",)
COMPILED = ("compile", "compile_no_graphs", "compile_tapped")
EXPERT = ("library", "quack")
FUSED = ("native", "triton")
STAGES = (1, 2, 3, 4)
RASTERS = (768, 1536)
BOTH = "forward+backward"
NOT_MEASURED = "not measured"


def floor_ms(row: Row) -> float:
    """The least time on the measured roof."""
    return 1e3 * max(float(row[f"floor_{kind}"]) / float(row[f"roof_{kind}"]) for kind in ("flops", "bytes"))


def ms(row: Row) -> float:
    return float(row["p50_ms"])


def workloads(rasters: Iterable[int], images: int, stages: Iterable[int] = STAGES) -> list[str]:
    """Names of those in bfloat16 with hidden width 1024."""
    suffix = f"-b{images}" if images > 1 else ""
    return [f"{raster}-stage{stage}-bfloat16{suffix}" for raster in rasters for stage in stages]


def with_suffix(suffix: str) -> tuple[str, ...]:
    return tuple(backend + suffix for backend in BACKENDS)


class Measured:
    """The timed rows by session, in the file's order; a time is only ever divided by one of its own session."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.sessions: dict[tuple[str, str, str, str], dict[str, Row]] = {}
        for row in rows:
            if row["p50_ms"]:
                key = (row["operation"], row["workload"], row["direction"], row["session"])
                self.sessions.setdefault(key, {})[row["variant"]] = row

    def last(
        self, workload: str, direction: str, *sides: Iterable[str], operation: str = "cvfm"
    ) -> tuple[Row, ...] | None:
        """The fastest of the variants of each side, in the last session that has one of every side."""
        for key, timed in reversed(self.sessions.items()):
            if key[:3] == (operation, workload, direction):
                found = [[timed[name] for name in side if name in timed] for side in sides]
                if all(found):
                    return tuple(min(rows, key=ms) for rows in found)
        return None

    def fastest(
        self, workload: str, direction: str, variants: Iterable[str] = BACKENDS, operation: str = "cvfm"
    ) -> Row | None:
        found = self.last(workload, direction, variants, operation=operation)
        return found and found[0]

    def pairs(
        self, names: Iterable[str], direction: str, left: Iterable[str], right: Iterable[str], operation: str = "cvfm"
    ) -> list[tuple[Row, Row]]:
        """The fastest of the left and of the right variants, for workloads that have both in one session."""
        found = (self.last(name, direction, left, right, operation=operation) for name in names)
        return [(pair[0], pair[1]) for pair in found if pair]

    def names(self, operation: str) -> list[str]:
        return list(dict.fromkeys(name for kind, name, *_ in self.sessions if kind == operation))

    def speed_up(
        self, raster: int, direction: str, base: Iterable[str], stages: Iterable[int] = STAGES
    ) -> float | None:
        """The base's time over this package's, summed over stages; the lower of 8 and 32 images."""
        found = []
        for images in (8, 32):
            names = workloads([raster], images, stages)
            pairs = self.pairs(names, direction, base, BACKENDS)
            if len(pairs) == len(names):
                found.append(sum(ms(left) for left, _ in pairs) / sum(ms(right) for _, right in pairs))
        return min(found, default=None)

    def all(self, names: Sequence[str], direction: str, variants: Iterable[str] = BACKENDS) -> list[Row] | None:
        """The fastest of every workload; None unless all were measured."""
        rows = [row for name in names if (row := self.fastest(name, direction, variants))]
        return rows if len(rows) == len(names) else None

    def floor_share(self, direction: str) -> float | None:
        rows = self.all(workloads(RASTERS, 32), direction)
        return sum(map(floor_ms, rows)) / sum(map(ms, rows)) if rows else None

    def graph_microseconds(self) -> float | None:
        rows = self.all(workloads([1536], 1), "forward", with_suffix("_graph"))
        return 1e3 * sum(map(ms, rows)) / len(rows) if rows else None

    def gemm_share(self) -> float | None:
        names = self.names("gemm")
        pairs = [p for part in ("fc1", "fc2") for p in self.pairs(names, part, ["cublas"], BACKENDS, "gemm")]
        return min((ms(plain) / ms(fused) for plain, fused in pairs), default=None)

    def bandwidth_share(self) -> float | None:
        graphs = with_suffix("_graph")
        found = (self.fastest(n, "backward", graphs, "crop_resize") for n in workloads(RASTERS, 8))
        return min(
            (float(r["floor_bytes"]) / (ms(r) * 1e-3) / float(r["roof_bytes"]) for r in found if r), default=None
        )

    def kept_share(self, suffix: str = "") -> float | None:
        pairs = self.pairs(workloads(RASTERS, 8), BOTH, with_suffix(suffix), EAGER)
        shares = (
            float(a["kept_bytes"]) / float(b["kept_bytes"]) for a, b in pairs if a["kept_bytes"] and b["kept_bytes"]
        )
        return max(shares, default=None)

    def recompute_cost(self) -> float | None:
        pairs = self.pairs(workloads(RASTERS, 8), BOTH, with_suffix("_recompute"), BACKENDS)
        return max((ms(again) / ms(kept) - 1 for again, kept in pairs), default=None)

    def host_microseconds(self) -> float | None:
        rows = (self.fastest(name, "forward") for name in workloads(RASTERS, 1))
        return max((1e3 * float(row["host_ms"]) for row in rows if row and row["host_ms"]), default=None)

    def largest_error(self) -> float | None:
        fused = (row for timed in self.sessions.values() for row in timed.values() if row["variant"] in FUSED)
        return max((float(row["error"]) for row in fused if row["error"]), default=None)

    def gather_cost(self) -> float | None:
        names, graphs = self.names("crop_resize"), with_suffix("_graph")
        pairs = self.pairs(names, "backward", graphs, ["scattered_graph"], "crop_resize")
        return max((ms(gathered) / ms(scattered) - 1 for gathered, scattered in pairs), default=None)


@dataclass(frozen=True)
class Goal:
    """A goal on a GPU, and how its numbers are read from the rows and printed."""

    what: str
    must: str
    aim: str
    read: tuple[Callable[[Measured], float | None], ...]
    form: str = "{:.2f}x"


GOALS = (
    Goal(
        "forward, four stages, hidden 1024, 8 or more images, 768 input, against tuned eager / torch.compile",
        "1.7x / 1.25x", "1.95x / 1.45x",
        (lambda m: m.speed_up(768, "forward", EAGER), lambda m: m.speed_up(768, "forward", COMPILED)),
    ),
    Goal(
        "the same, 1536 input",
        "1.5x / 1.1x", "1.75x / 1.3x",
        (lambda m: m.speed_up(1536, "forward", EAGER), lambda m: m.speed_up(1536, "forward", COMPILED)),
    ),
    Goal(
        "forward, stage 4 with 768 input, against torch.compile",
        "1.4x", "1.8x",
        (lambda m: m.speed_up(768, "forward", COMPILED, [4]),),
    ),
    Goal(
        "forward, stage 1 with 1536 input, against torch.compile",
        "1.1x", "1.3x",
        (lambda m: m.speed_up(1536, "forward", COMPILED, [1]),),
    ),
    Goal(
        "forward against an expert's library calls, 768 / 1536 input",
        "1.0x / 1.0x", "1.2x / 1.2x",
        (lambda m: m.speed_up(768, "forward", EXPERT), lambda m: m.speed_up(1536, "forward", EXPERT)),
    ),
    Goal(
        "forward + backward against an expert's library calls, 768 / 1536 input",
        "1.0x / 1.0x", "1.2x / 1.2x",
        (lambda m: m.speed_up(768, BOTH, EXPERT), lambda m: m.speed_up(1536, BOTH, EXPERT)),
    ),
    Goal(
        "forward + backward against tuned eager, 768 / 1536 input",
        "1.9x / 2.6x", "2.4x / 3.6x",
        (lambda m: m.speed_up(768, BOTH, EAGER), lambda m: m.speed_up(1536, BOTH, EAGER)),
    ),
    Goal(
        "forward + backward, stage 1 at 1536, against tuned eager",
        "4x", "7x",
        (lambda m: m.speed_up(1536, BOTH, EAGER, [1]),),
    ),
    Goal(
        "fraction of the floor at 32 images, forward / forward + backward",
        "0.68 / 0.65", "0.75 / 0.72",
        (lambda m: m.floor_share("forward"), lambda m: m.floor_share(BOTH)),
        "{:.2f}",
    ),
    Goal(
        "GEMM with its epilogue against cuBLAS's plain GEMM, same M, N, K: the slowest of fc1 and fc2",
        "0.90", "0.97",
        (Measured.gemm_share,),
        "{:.2f}",
    ),
    Goal(
        "one image of 5 tiles in a CUDA graph, forward, mean of the four stages at 1536",
        "38 us", "33 us",
        (Measured.graph_microseconds,),
        "{:.0f} us",
    ),
    Goal(
        "crop-resize backward kernel in a CUDA graph, share of measured copy bandwidth (dF written once, dS read once)",
        "75 %", "90 %",
        (Measured.bandwidth_share,),
        "{:.0%}",
    ),
    Goal(
        "activations kept for backward, against eager: as planned / with recompute",
        "0.4 / 0.25", "none, at the time below",
        (Measured.kept_share, lambda m: m.kept_share("_recompute")),
        "{:.2f}",
    ),
    Goal(
        "time of a step that keeps nothing, over the planned one", "-", "at most +25 %", (Measured.recompute_cost,),
        "{:+.0%}",
    ),
    Goal("host time per call", "50 us", "30 us", (Measured.host_microseconds,), "{:.0f} us"),
    Goal("error against float64, over eager's", "1.1x", "1.0x", (Measured.largest_error,)),
    Goal(
        "cost of bitwise-equal repeats: gathering over atomic crop-resize backward, both in a CUDA graph",
        "tested", "at most 2 %",
        (Measured.gather_cost,),
        "{:+.0%}",
    ),
)  # fmt: skip


def lines(rows: Iterable[Row]) -> list[list[str]]:
    """Goal, must, aim, measured; `rows` are one GPU's."""
    found = Measured(rows)
    table = []
    for goal in GOALS:
        values = [read(found) for read in goal.read]
        told = " / ".join(NOT_MEASURED if value is None else goal.form.format(value) for value in values)
        nothing = all(value is None for value in values)
        table.append([goal.what, goal.must, goal.aim, NOT_MEASURED if nothing else told])
    return table

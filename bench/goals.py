"""The goals on a GPU, and what a CSV says about each: `docs/benchmarks.md` is filled from here.

Own time is that of the fastest of this package's backends with the planner's plan; torch.compile's that of its fastest
variant. Sums over stages are sums of medians.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Row = dict[str, str]
Rows = dict[tuple[str, str, str, str], Row]  # (operation, case, direction, variant)
OWN = ("eager", "native", "triton", "torch", "cuda")  # the last two in rows from before the backends were renamed
COMPILED = ("compile", "compile_no_graphs", "compile_tapped")
STAGES = (1, 2, 3, 4)
MANY = (8, 32)
NOT_MEASURED = "not measured"


def index(rows: Iterable[Row]) -> Rows:
    """The last timed row of each kind."""
    return {(r["operation"], r["case"], r["direction"], r["variant"]): r for r in rows if r["p50_ms"]}


def case(raster: int, stage: int, images: int) -> str:
    return f"{raster}-stage{stage}-bfloat16" + (f"-b{images}" if images > 1 else "")


def fastest(rows: Rows, name: str, direction: str, variants: Iterable[str], operation: str = "cvfm") -> Row | None:
    found = [rows[key] for v in variants if (key := (operation, name, direction, v)) in rows]
    return min(found, key=lambda row: float(row["p50_ms"]), default=None)


def own(rows: Rows, name: str, direction: str, suffix: str = "") -> Row | None:
    return fastest(rows, name, direction, [backend + suffix for backend in OWN])


def speed_up(rows: Rows, names: list[str], direction: str, base: Iterable[str]) -> float | None:
    """The base's time over this package's, summed over the cases; None unless all of them are there."""
    pairs = [(fastest(rows, name, direction, base), own(rows, name, direction)) for name in names]
    if not all(left and right for left, right in pairs):
        return None
    times = [(float(left["p50_ms"]), float(right["p50_ms"])) for left, right in pairs if left and right]
    return sum(left for left, _ in times) / sum(right for _, right in times)


def lowest(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return min(found, default=None)


def many(rows: Rows, raster: int, direction: str, base: Iterable[str], stages: Iterable[int] = STAGES) -> float | None:
    """The lowest speed-up of those numbers of images, from 8 on, that were measured."""
    return lowest(speed_up(rows, [case(raster, s, n) for s in stages], direction, base) for n in MANY)


def floor_share(rows: Rows, direction: str) -> float | None:
    """The floor's share of the time, over both rasters and four stages at 32 images."""
    found = [own(rows, case(raster, s, 32), direction) for raster in (768, 1536) for s in STAGES]
    timed = [row for row in found if row]
    if len(timed) < len(found):
        return None
    floors = [
        1e3 * max(float(r["floor_flops"]) / float(r["roof_flops"]), float(r["floor_bytes"]) / float(r["roof_bytes"]))
        for r in timed
    ]
    return sum(floors) / sum(float(row["p50_ms"]) for row in timed)


def graph_microseconds(rows: Rows) -> float | None:
    found = [own(rows, case(1536, s, 1), "forward", "_graph") for s in STAGES]
    times = [float(row["p50_ms"]) * 1e3 for row in found if row]
    return sum(times) / len(times) if len(times) == len(found) else None


def bandwidth_share(rows: Rows) -> float | None:
    """crop_resize's backward pass, least bytes over time over the copy's; the lowest of 8 images' cases."""
    found = [
        fastest(rows, case(raster, s, 8), "backward", OWN, "crop_resize") for raster in (768, 1536) for s in STAGES
    ]  # fmt: skip
    return lowest(
        float(r["floor_bytes"]) / (float(r["p50_ms"]) * 1e-3) / float(r["roof_bytes"]) for r in found if r
    )  # fmt: skip


def kept_share(rows: Rows, suffix: str = "") -> float | None:
    """The largest share of tuned eager's kept activations, 8 images."""
    shares = []
    for raster in (768, 1536):
        for stage in STAGES:
            name = case(raster, stage, 8)
            base, ours = rows.get(("cvfm", name, "forward+backward", "tuned_eager")), own(
                rows, name, "forward+backward", suffix
            )  # fmt: skip
            if base and ours and base["kept_bytes"] and ours["kept_bytes"]:
                shares.append(float(ours["kept_bytes"]) / float(base["kept_bytes"]))
    return max(shares, default=None)


def recompute_time(rows: Rows) -> float | None:
    """How much longer a step takes that keeps nothing, at worst, 8 images."""
    costs = []
    for raster in (768, 1536):
        for stage in STAGES:
            name = case(raster, stage, 8)
            kept, again = own(rows, name, "forward+backward"), own(rows, name, "forward+backward", "_recompute")
            if kept and again:
                costs.append(float(again["p50_ms"]) / float(kept["p50_ms"]) - 1)
    return max(costs, default=None)


def host_microseconds(rows: Rows) -> float | None:
    """The longest forward call's, one image, of the backend that is fastest there."""
    found = [own(rows, case(raster, s, 1), "forward") for raster in (768, 1536) for s in STAGES]
    return max((float(row["host_ms"]) * 1e3 for row in found if row and row["host_ms"]), default=None)


def largest_error(rows: Rows) -> float | None:
    return max((float(r["error"]) for key, r in rows.items() if key[3] in OWN[1:] and r["error"]), default=None)


def atomic_cost(rows: Rows) -> float | None:
    """How much longer the gathering backward pass takes than the atomic one, at worst; negative where it is faster."""
    costs = []
    for (operation, name, direction, variant), scattered in rows.items():
        if (operation, direction, variant) == ("crop_resize", "backward", "scattered"):
            gathered = fastest(rows, name, "backward", OWN, "crop_resize")
            if gathered:
                costs.append(float(gathered["p50_ms"]) / float(scattered["p50_ms"]) - 1)
    return max(costs, default=None)


@dataclass(frozen=True)
class Goal:
    """What is wanted, and how each of its numbers is read off the rows and printed."""

    what: str
    must: str
    aim: str
    read: tuple[Callable[[Rows], float | None], ...]
    form: str = "{:.2f}x"


EAGER = ("tuned_eager",)
GOALS = (
    Goal(
        "forward, four stages, hidden 1024, 8 or more images, 768 input, against tuned eager / torch.compile",
        "1.7x / 1.25x", "1.95x / 1.45x",
        (lambda r: many(r, 768, "forward", EAGER), lambda r: many(r, 768, "forward", COMPILED)),
    ),
    Goal(
        "the same, 1536 input",
        "1.5x / 1.1x", "1.75x / 1.3x",
        (lambda r: many(r, 1536, "forward", EAGER), lambda r: many(r, 1536, "forward", COMPILED)),
    ),
    Goal(
        "forward, stage 4 with 768 input, against torch.compile",
        "1.4x", "1.8x",
        (lambda r: many(r, 768, "forward", COMPILED, (4,)),),
    ),
    Goal(
        "forward + backward against tuned eager, 768 / 1536 input",
        "1.9x / 2.6x", "2.4x / 3.6x",
        tuple(lambda r, raster=raster: many(r, raster, "forward+backward", EAGER) for raster in (768, 1536)),
    ),
    Goal(
        "forward + backward, stage 1 at 1536, against tuned eager",
        "4x", "7x",
        (lambda r: many(r, 1536, "forward+backward", EAGER, (1,)),),
    ),
    Goal(
        "fraction of the floor at 32 images, forward / forward + backward",
        "0.68 / 0.65", "0.75 / 0.72",
        (lambda r: floor_share(r, "forward"), lambda r: floor_share(r, "forward+backward")),
        "{:.2f}",
    ),
    Goal(
        "GEMM with its epilogue against cuBLAS's plain GEMM, same M, N, K: the slowest of fc1 and fc2",
        "0.90", "0.97",
        (lambda r: gemm_share(r),),
        "{:.2f}",
    ),
    Goal(
        "one image of 5 tiles in a CUDA graph, forward, mean of the four stages at 1536",
        "38 us", "33 us",
        (graph_microseconds,),
        "{:.0f} us",
    ),
    Goal(
        "crop-resize backward kernel, share of measured copy bandwidth (dF written once, dS read once)",
        "75 %", "90 %",
        (bandwidth_share,),
        "{:.0%}",
    ),
    Goal(
        "activations kept for backward, against eager: as planned / with recompute",
        "0.4 / 0.25", "none, at the time below",
        (kept_share, lambda r: kept_share(r, "_recompute")),
        "{:.2f}",
    ),
    Goal("time of a step that keeps nothing, over the planned one", "-", "at most +25 %", (recompute_time,), "{:+.0%}"),
    Goal("host time a call", "50 us", "30 us", (host_microseconds,), "{:.0f} us"),
    Goal("error against float64, over eager's", "1.1x", "1.0x", (largest_error,)),
    Goal(
        "cost of bitwise-equal repeats: gathering over atomic crop-resize backward",
        "tested", "at most 2 %",
        (atomic_cost,),
        "{:+.0%}",
    ),
)  # fmt: skip


def gemm_share(rows: Rows) -> float | None:
    """cuBLAS's time over the fused GEMM's, at worst."""
    shares = []
    for (operation, name, direction, variant), plain in rows.items():
        if (operation, variant) == ("gemm", "cublas"):
            fused = fastest(rows, name, direction, OWN, "gemm")
            if fused:
                shares.append(float(plain["p50_ms"]) / float(fused["p50_ms"]))
    return min(shares, default=None)


def measured(goal: Goal, rows: Rows) -> str:
    values = [read(rows) for read in goal.read]
    if all(value is None for value in values):
        return NOT_MEASURED
    return " / ".join(NOT_MEASURED if value is None else goal.form.format(value) for value in values)


def lines(rows: Iterable[Row]) -> list[list[str]]:
    """Goal, must, aim, measured; `rows` are one GPU's."""
    found = index(rows)
    return [[goal.what, goal.must, goal.aim, measured(goal, found)] for goal in GOALS]

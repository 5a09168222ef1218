"""Predicts each launch's time on a Hopper from its machine code, its grid and the boxes, and says what bounds it.

    python -m tools.issue_slots                     # all stages, one and eight images: bench/results/issue_slots.csv
    python -m tools.issue_slots --workload 1536-stage1-bfloat16-b8 --state trial --csv trial.csv

The launchers run as in training, `tools/compiled_kernels.py` compiles what they launch for sm_90, and `tools/sass.py`
counts the instructions that a warp issues: the longest way through each basic block graph, loops as often as the
launch's sizes and the boxes say. A multiprocessor issues four warp instructions per clock, computes 2,048
multiply-adds and 16 special functions (MUFU); memory moves what a copy does. A time is the longest of these, and of a
product the sum over its tiles of the main loop and the rest, which only another resident block can hide.

Bytes count each tensor once, of maps the cells that are read. Not modelled: latency, bank conflicts, reads that miss
L2 a second time, the cost of a launch. Every time is a prediction; nothing here was measured.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from bench.workloads import DTYPES, RASTERS, STAGES, Workload
from fila_kernels import planner
from fila_kernels.backends.triton import cvfm
from fila_kernels.call import UNMEASURED, Call, Needs
from fila_kernels.sampling import axis_taps
from tools.compiled_kernels import Kernel, compiling, tile_of
from tools.sass import Code, Loop

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "issue_slots.csv"
SMS = 132
CLOCK = 1.83e9  # at which 132 x 2,048 multiply-adds are the 989 TFLOP/s of the data sheet
BANDWIDTH = 4.3e12  # a copy on an H200, read and written
FIELDS = (
    "state", "triton", "workload", "direction", "launch", "kernel", "tile", "warps", "registers", "shared", "resident",
    "waves", "instructions", "slots", "slots_per_output", "mma_us", "issue_us", "mufu_us", "epilogue_share", "hidden",
    "megabytes", "sectors_per_request", "memory_us", "predicted_us", "bound",
)  # fmt: skip
Row = dict[str, Any]


@dataclass
class Cost:
    """Warp instructions of a launch, special functions among them, and the main loop's share of both kinds of work."""

    slots: float
    mufu: float
    outputs: int
    tiles: int = 0  # of a product
    main_slots: float = 0.0  # per warp and tile
    rest_slots: float = 0.0
    rest_mufu: float = 0.0
    products: float = 0.0  # multiply-adds of a tile


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=256)
def code_of(text: str) -> Code:
    return Code(text)


def product_cost(kernel: Kernel, depths: list[int], tiles: int, outputs: int) -> Cost:
    """A product's: its loops over the depth in their order, each step of BLOCK_K, around them perhaps that over tiles.

    A loop that holds the tensor core's instructions of several steps was unrolled.
    """
    code, block_k = code_of(kernel.code), kernel.arguments["BLOCK_K"]
    loops = [loop for loop in _innermost(code.loops) if loop.has("HGMMA")]
    # A weight's gradient of two operands has a loop for each, of which a tile takes one.
    assert len(loops) in (len(depths), 2 * len(depths)), (kernel.name, len(loops), depths)
    step = min(loop.has("HGMMA") for loop in loops)
    trips = {
        loop: math.ceil(ceil_div(depth, block_k) * step / loop.has("HGMMA"))
        for loop, depth in zip(loops, depths * (len(loops) // len(depths)), strict=True)
    }
    persistent = [loop for loop in code.loops.inner if loop.inner and loop not in trips and loop.has("HGMMA")]
    programs = math.prod(kernel.grid)

    def total(prefix: str, main: bool) -> float:
        """Per tile."""
        inside = {loop: float(trips.get(loop, 0) if main else 0) for loop in loops}

        def times(loop: Loop) -> float:
            return inside.get(loop, tiles / programs if loop in persistent else 0.0)

        return code.count(times, prefix=prefix) * programs / tiles

    every, rest, mufu = total("", True), total("", False), total("MUFU", True)
    area = (kernel.arguments["BLOCK_M"] + kernel.arguments.get("TAIL_M", 0)) * kernel.arguments["BLOCK_N"]
    deep = sum(ceil_div(depth, block_k) * block_k for depth in depths)
    warps = kernel.num_warps
    return Cost(
        every * warps * tiles, mufu * warps * tiles, outputs, tiles, every - rest, rest, total("MUFU", False),
        area * deep,
    )  # fmt: skip


def _innermost(loop: Loop) -> list[Loop]:
    inner = [one for one in loop.inner if not one.waits]
    return [deeper for one in inner for deeper in _innermost(one)] if inner else [loop]


def plain_cost(kernel: Kernel, outputs: int, *trips: float) -> Cost:
    """Loops that stand one after the other, each as often as given."""
    code = code_of(kernel.code)
    loops = [loop for loop in code.loops.inner if not loop.waits]
    assert len(loops) <= len(trips), (kernel.name, len(loops), trips)
    times = dict(zip(loops, trips, strict=False))
    warps = kernel.num_warps * math.prod(kernel.grid)
    return Cost(
        code.count(lambda loop: times.get(loop, 0.0)) * warps,
        code.count(lambda loop: times.get(loop, 0.0), prefix="MUFU") * warps,
        outputs,
    )


def samples_of_cells(boxes: Tensor, size: int, maps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How many samples read each row [T, h] and each column [T, w] of cells."""
    counts = []
    for axis, cells in enumerate(maps):
        taps, weights = axis_taps(boxes[:, axis], boxes[:, 2 + axis], size, cells)
        lower, upper = taps[..., 0], taps[..., 1]
        count = torch.zeros(len(boxes), cells, dtype=torch.int64)
        count.scatter_add_(1, lower, torch.ones_like(lower))
        count.scatter_add_(1, upper, ((weights[..., 1] > 0) & (upper != lower)).long())
        counts.append(count)
    return counts[0], counts[1]


def gather_cost(kernel: Kernel, workload: Workload) -> Cost:
    """The transpose's: a block of a row's cells asks every tile of its map and walks the samples of that row."""
    names = kernel.arguments
    code, warps = code_of(kernel.code), kernel.num_warps
    (visit,) = code.loops.inner
    (walk_y,) = visit.inner
    (walk_x,) = walk_y.inner
    rows, columns = samples_of_cells(workload.boxes(), workload.grid, (workload.side, workload.side))
    block, channels = names["BLOCK_CELLS"], names["channels"] * names["VECTOR"]
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % block)).unflatten(1, (-1, block))
    most = padded.amax(2)  # samples of a block's cells, one after the other
    first = workload.image_index() == 0
    most, rows = most[first], rows[first]
    blocks_x = most.shape[1]
    missed = int((rows == 0).sum()) * blocks_x
    taken = int((rows > 0).sum()) * blocks_x
    steps_y = int(rows.sum()) * blocks_x
    steps_xy = int((rows.sum(1) * most.sum(1)).sum())
    each = workload.images * ceil_div(channels, names["BLOCK_C"]) * warps

    def counted(prefix: str) -> float:
        def once(loop: Loop, longest: bool = True) -> float:
            return code.count(lambda _: 0.0, loop, longest, prefix)

        base = once(code.loops) * math.prod(kernel.grid) * warps
        return base + each * (
            missed * once(visit, False) + taken * once(visit) + steps_y * once(walk_y) + steps_xy * once(walk_x)
        )

    return Cost(counted(""), counted("MUFU"), workload.images * workload.side**2 * channels)


def cost_of(kernel: Kernel, workload: Workload) -> Cost:
    """A launch's, by the name of its kernel and its arguments."""
    names, name = kernel.arguments, kernel.name.split(" ")[0]
    if "extent" in names and name != "single_pass_fwd" and name != "weight_grad":
        config, extent = kernel.config, names["extent"]
        terms = [names["term"], names["term_2"]] if names["term_2"] is not None else [names["term"]]
        tiles = ceil_div(extent.num_rows, config.rows) * ceil_div(extent.num_columns, config.block_n)  # type: ignore
        outputs = extent.num_rows * extent.num_columns
        return product_cost(kernel, [term.depth for term in terms], tiles, outputs)
    if name == "weight_grad":
        steps = names["num_tiles"] * ceil_div(names["patches"], names["BLOCK_K"])
        depth = ceil_div(steps, names["num_splits"]) * names["BLOCK_K"]
        outputs = names["extent"].num_rows * names["extent"].num_columns
        return product_cost(kernel, [depth], math.prod(kernel.grid), outputs)
    if name == "reduce":
        return plain_cost(kernel, names["rows"] * names["columns"], ceil_div(names["num_parts"], names["BLOCK_P"]))
    if name == "crop_tables":
        trips = ceil_div(workload.side, names["BLOCK_CELLS"]), ceil_div(names["num_tiles"], names["BLOCK_T"])
        return plain_cost(kernel, 4 * names["num_tiles"] * names["size"], *trips)
    if name == "crop_resize_fwd":
        return plain_cost(kernel, workload.samples * workload.channels)
    if name == "crop_resize_bwd":
        return gather_cost(kernel, workload)
    if name == "gate_bwd":
        return plain_cost(kernel, names["num_rows"] * names["token_width"])
    raise NotImplementedError(kernel.name)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors_of(one)
    elif hasattr(value, "base"):
        yield value.base


def bytes_of(kernel: Kernel, workload: Workload) -> int:
    """Each tensor once; of the map that is sampled, the cells that samples read."""
    found = {(t.data_ptr(), t.shape): t for value in kernel.arguments.values() for t in tensors_of(value)}
    total = sum(t.numel() * t.element_size() for t in found.values())
    if kernel.name == "crop_resize_fwd":
        features = kernel.arguments["p_features"]
        rows, columns = samples_of_cells(workload.boxes(), workload.grid, (workload.side, workload.side))
        touched = sum(int((y > 0).sum() * (x > 0).sum()) for y, x in zip(rows, columns, strict=True))
        cells = min(touched, workload.images * workload.side**2)
        total += cells * workload.channels * features.element_size() - features.numel() * features.element_size()
    return total


def sectors(kernel: Kernel) -> float:
    """Sectors of 32 bytes per access of a full warp whose lanes are neighbours, over the kernel's global accesses."""
    widths = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}
    total = count = 0
    for name, number in kernel.instructions.items():
        if name.startswith(("LDG", "STG")):
            width = next((size for word, size in widths.items() if word in name), 4)
            total, count = total + number * max(1, width), count + number
    return total / count if count else 0.0


def row_of(kernel: Kernel, workload: Workload) -> Row:
    cost, resident, warps = cost_of(kernel, workload), kernel.resident, kernel.num_warps
    issue, mufu = cost.slots / (SMS * 4), cost.mufu * 32 / (SMS * 16)
    mma = cost.products * cost.tiles / 2048 / SMS
    memory = bytes_of(kernel, workload) / BANDWIDTH
    programs = cost.tiles or math.prod(kernel.grid)
    hidden = share = ""
    if cost.tiles:
        main = max(cost.products / 2048, cost.main_slots * warps / 4)
        rest = max(cost.rest_slots * warps / 4, cost.rest_mufu * warps * 2)
        most = ceil_div(cost.tiles, SMS)  # tiles of the busiest multiprocessor
        alone = main + rest
        busy = max(cost.products / 2048, (cost.main_slots + cost.rest_slots) * warps / 4)
        together = max(busy, alone / min(resident, most))
        cycles = most * together
        share, hidden = f"{rest / alone:.2f}", f"{(alone - together) / rest:.2f}"
        bound = "main loop and epilogue" if together > busy else "MMA" if busy == cost.products / 2048 else "issue"
    else:
        cycles = max(issue, mufu)
        bound = "issue" if issue > mufu else "MUFU"
    seconds = max(cycles / CLOCK, memory)
    tile, _ = tile_of(kernel.config)
    return {
        "kernel": kernel.name, "tile": tile, "warps": warps, "registers": kernel.registers, "shared": kernel.shared,
        "resident": resident, "waves": f"{programs / (SMS * resident):.2f}",
        "instructions": sum(kernel.instructions.values()), "slots": round(cost.slots),
        "slots_per_output": f"{cost.slots * 32 / cost.outputs:.2f}", "mma_us": f"{mma / CLOCK * 1e6:.2f}",
        "issue_us": f"{issue / CLOCK * 1e6:.2f}", "mufu_us": f"{mufu / CLOCK * 1e6:.2f}", "epilogue_share": share,
        "hidden": hidden, "megabytes": f"{memory * BANDWIDTH / 1e6:.2f}",
        "sectors_per_request": f"{sectors(kernel):.1f}",
        "memory_us": f"{memory * 1e6:.2f}", "predicted_us": f"{seconds * 1e6:.2f}",
        "bound": "memory" if seconds == memory else bound,
    }  # fmt: skip


def vendor_row(rows: int, columns: int, depth: int, size: int) -> Row:
    """A plain product by the vendor's library: its multiply-adds or its bytes."""
    mma = rows * columns * depth / 2048 / SMS / CLOCK
    memory = size * (rows * depth + depth * columns + rows * columns) / BANDWIDTH
    bound = "MMA" if mma > memory else "memory"
    return {
        "kernel": "addmm", "mma_us": f"{mma * 1e6:.2f}", "memory_us": f"{memory * 1e6:.2f}",
        "predicted_us": f"{max(mma, memory) * 1e6:.2f}", "bound": bound,
    }  # fmt: skip


def example(workload: Workload) -> Call:
    """A call of the workload's sizes on memory that is never read."""
    shape, dtype = workload.shape, DTYPES[workload.dtype]
    plan = planner._by_cost(shape, dtype, torch.device("cuda"), planner._Means("triton", "triton", UNMEASURED))

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype)

    d, h, c = shape.token_width, shape.hidden_width, shape.feature_width
    return Call(
        empty(shape.tiles, shape.prefix + shape.patches, d), empty(*shape.maps, c), workload.boxes(),
        workload.image_index(), empty(h, d + c), empty(h), empty(d, h), empty(d), empty(1), shape, "product", plan,
    )  # fmt: skip


@contextmanager
def vendor_products(found: list[Any]) -> Iterator[None]:
    """Within, `torch.addmm` computes nothing and is added to `found`."""

    def addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        found.append(vendor_row(left.shape[0], right.shape[1], left.shape[1], left.element_size()))
        return left.new_empty(left.shape[0], right.shape[1])

    with mock.patch.object(torch, "addmm", addmm):
        yield


def launches(workload: Workload) -> Iterator[tuple[str, list[Any]]]:
    """Each direction's launches in training: compiled kernels, or the rows of vendor products."""
    call = example(workload)
    hidden = torch.empty((call.shape.samples, call.shape.hidden_width), dtype=call.dtype)
    branch = torch.empty((call.shape.samples, call.shape.token_width), dtype=call.dtype)
    for direction in ("forward", "backward"):
        found: list[Any] = []
        with vendor_products(found), compiling(90, found):
            if direction == "forward":
                cvfm.forward(call, hidden, branch)
            else:
                cvfm.backward(call, torch.empty_like(call.tokens), hidden, branch, Needs(*[True] * 7))
        yield direction, found


def rows_of(workload: Workload, state: str) -> list[Row]:
    rows = []
    for direction, found in launches(workload):
        for number, one in enumerate(found, 1):
            row = one if isinstance(one, dict) else row_of(one, workload)
            known = {"state": state, "triton": triton.__version__, "workload": workload.name, "direction": direction}
            rows.append({**known, "launch": number, **row})
    return rows


def write(path: Path, rows: list[Row], state: str) -> None:
    """Replaces the rows of this state and these workloads; keeps the others."""
    kept: list[Row] = []
    names = {row["workload"] for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["state"] != state or row["workload"] not in names]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(kept + rows)


WORKLOADS = {
    workload.name: workload
    for images in (1, 8)
    for raster in RASTERS
    for stage in STAGES
    for workload in [Workload(raster, stage, "bfloat16", images)]
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="*", default=list(WORKLOADS), choices=tuple(WORKLOADS))
    parser.add_argument("--state", default="after", help="a label for the rows, such as before or after")
    parser.add_argument("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.relative_to(ROOT)}")
    given = parser.parse_args()
    for name in given.workload:
        rows = rows_of(WORKLOADS[name], given.state)
        write(given.csv, rows, given.state)
        for direction in ("forward", "backward"):
            own = [row for row in rows if row["direction"] == direction]
            total = sum(float(row["predicted_us"]) for row in own)
            print(f"{name} {direction}: {len(own)} launches, {total:.0f} us predicted", flush=True)
            for row in own:
                print(
                    f"  {row['kernel']:26}{row.get('tile', ''):22}{row['predicted_us']:>8} us  {row['bound']:24}"
                    f"{row.get('slots_per_output', ''):>9} slots per output, {row.get('resident', '')} resident"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())

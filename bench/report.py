"""Makes speed-up tables, the goals on a GPU, and plots from the bench's CSV files alone.

    python -m bench.report bench/results/cvfm_cpu.csv                 # the table
    python -m bench.report bench/results/cvfm_cpu.csv --plots FOLDER  # and speed-up bars and a roofline chart as SVG

A picture holds a digest of its CSV, which shows whether it is up to date.
"""

import argparse
import hashlib
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import goals, records
from bench.engine import CLOCKS, METERS
from bench.records import Row

BASES = {"cvfm": "tuned_eager", "crop_resize": "sliced", "gemm": "cublas", "tower": "fusion_tuned_eager"}
LABELS = {
    "tuned_eager": "tuned eager (E1)", "naive_eager": "naive eager (E0)", "compile": "torch.compile (C)",
    "library": "library calls (L)", "eager": "fila_kernels, eager", "native": "fila_kernels, native",
    "triton": "fila_kernels, triton",
}  # fmt: skip
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


Pairs = dict[str, tuple[Row, Row]]  # by workload: the base's row and another variant's, of one session


def sessions(rows: Iterable[Row], operation: str, direction: str) -> dict[tuple[str, str], dict[str, Row]]:
    """{(workload, session): {variant: row}}, in the file's order."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if (row["operation"], row["direction"]) == (operation, direction):
            found.setdefault((row["workload"], row["session"]), {})[row["variant"]] = row
    return found


def pairs(rows: Iterable[Row], operation: str, direction: str) -> dict[str, Pairs]:
    """{variant: {workload: (base, variant)}} of those that were timed, each from the last session that timed both.

    Times of two sessions are never divided: a clock that has changed in between would show as a speed-up.
    """
    base = BASES[operation]
    found: dict[str, Pairs] = {}
    for (workload, _), variants in sessions(rows, operation, direction).items():
        timed = {name: row for name, row in variants.items() if row["p50_ms"]}
        for name, row in timed.items():
            if base in timed and name != base:
                found.setdefault(name, {})[workload] = timed[base], row
    return found


def speed_ups(rows: Iterable[Row], operation: str, direction: str) -> dict[str, dict[str, float]]:
    """{variant: {workload: speed-up over the operation's base}}."""
    return {
        name: {workload: goals.ms(base) / goals.ms(row) for workload, (base, row) in of.items()}
        for name, of in pairs(rows, operation, direction).items()
    }


def table(rows: list[Row]) -> str:
    """For each operation and direction the base's time and every other variant's speed-up over it.

    A speed-up is followed by the share of the base's extra memory and by the floor's share of the time.
    """
    lines: list[str] = []
    for operation, direction in dict.fromkeys((row["operation"], row["direction"]) for row in rows):
        found, ratios = pairs(rows, operation, direction), speed_ups(rows, operation, direction)
        base, wide = BASES[operation], max(len(row["workload"]) for row in rows) + 2
        columns = {name: max(len(name), 18) + 2 for name in found}
        heads = "".join(f"{name:>{width}}" for name, width in columns.items())
        lines.append(f"{operation}, {direction}\n  {'workload':<{wide}}{base + ' ms':>20}{heads}")
        for workload in dict.fromkeys(workload for workload, _ in sessions(rows, operation, direction)):
            start = next((found[name][workload][0] for name in found if workload in found[name]), None)
            if start is None:
                lines.append(f"  {workload:<{wide}}{'not timed':>20}")
                continue
            cells = (f"{_cell(found[name].get(workload)):>{width}}" for name, width in columns.items())
            lines.append(f"  {workload:<{wide}}{goals.ms(start):>20.3f}{''.join(cells)}")
        means = (f"{statistics.geometric_mean(ratios[n].values()):.2f}x".rjust(width) for n, width in columns.items())
        lines.append(f"  {'geometric mean':<{wide}}{'':>20}{''.join(means)}\n")
    for row in rows:
        if row["note"]:
            what = "note" if row["p50_ms"] else "not timed"
            lines.append(f"{what}: {row['workload']}, {row['direction']}, {row['variant']}: {row['note']}")
    first = rows[0]
    cpu = first["clock"] in CLOCKS
    clock = f"{first['threads']} threads ({first['clock']} clock)" if cpu else "CUDA events"
    lines.append(f"{first['device']}, {clock}, torch {first['torch']}, commit {first['commit']}")
    lines.append(f"speed-up of medians; m: share of the base's extra memory ({METERS['cpu' if cpu else 'cuda']})")
    lines.append("f: share of the time that the floor on the measured roof would take")
    return "\n".join(lines)


def _cell(pair: tuple[Row, Row] | None) -> str:
    if pair is None:
        return "-"
    base, row = pair
    text = f"{goals.ms(base) / goals.ms(row):.2f}x"
    if row["extra_memory_bytes"] and float(base["extra_memory_bytes"] or 0):
        text += f" m{float(row['extra_memory_bytes']) / float(base['extra_memory_bytes']):.2f}"
    return f"{text} f{goals.floor_ms(row) / goals.ms(row):.2f}" if row["roof_flops"] else text


def figure_tools() -> Any:
    """matplotlib's pyplot without a screen, set so that one CSV always makes the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fila"})
    import matplotlib.pyplot

    return matplotlib.pyplot


def digest(file: Path) -> str:
    """The digest that a picture carries of the CSV that it was made from."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def source(picture: Path) -> str | None:
    """The digest that a picture holds."""
    found = re.search(r"made from (\S+ [0-9a-f]{12})", picture.read_text())
    return found and found[1]


def _draw_bars(axes: Any, rows: list[Row], operation: str, direction: str) -> None:
    """Speed-up bars, one group per workload."""
    found, base = speed_ups(rows, operation, direction), BASES[operation]
    workloads = list(dict.fromkeys(name for values in found.values() for name in values))
    width = 0.8 / len(found)
    axes.figure.set_size_inches(max(6, 0.35 * len(workloads) * len(found) + 2), 4.5)
    for number, (name, values) in enumerate(found.items()):
        shift = (number - (len(found) - 1) / 2) * width
        places = [index + shift for index, workload in enumerate(workloads) if workload in values]
        axes.bar(places, [values[w] for w in workloads if w in values], width, label=LABELS.get(name, name))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel(f"speed-up over {LABELS.get(base, base)}")


def _draw_roofline(axes: Any, rows: list[Row], direction: str) -> None:
    """`cvfm`'s rates over FLOPs per byte, by the floor's FLOPs and bytes, below each dtype's measured roof."""
    axes.figure.set_size_inches(7, 5)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    roofs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["operation"], row["direction"]) == ("cvfm", direction) and row["p50_ms"] and row["roof_flops"]:
            dtype = next(name for name in MARKERS if name in row["workload"].split("-"))
            flops = float(row["floor_flops"])
            place = (flops / float(row["floor_bytes"]), flops / (float(row["p50_ms"]) * 1e-3))
            points.setdefault((row["variant"], dtype), []).append(place)
            roofs.setdefault(dtype, []).append((float(row["roof_flops"]), float(row["roof_bytes"])))
    intensities = [x for values in points.values() for x, _ in values]
    for dtype, found in roofs.items():
        rate, bandwidth = (sorted(roof[i] for roof in found)[len(found) // 2] for i in (0, 1))
        edges = sorted([min(intensities) / 2, rate / bandwidth, max(intensities) * 2])
        style = "-" if dtype == "bfloat16" else "--"
        rates = [min(rate, x * bandwidth) for x in edges]
        axes.plot(edges, rates, style, color="black", linewidth=1, label=f"measured roof, {dtype}")
    names = list(dict.fromkeys(name for name, _ in points))
    for (name, dtype), values in points.items():
        label, colour = f"{LABELS.get(name, name)}, {dtype}", f"C{names.index(name)}"
        axes.scatter(*zip(*values, strict=True), s=16, color=colour, marker=MARKERS[dtype], label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (floor)", ylabel="FLOP/s")


def draw(file: Path, folder: Path) -> list[Path]:
    """Draw what a CSV holds into a folder; returns the pictures' paths."""
    rows, drawn = records.read(file), []
    folder.mkdir(parents=True, exist_ok=True)
    plt = figure_tools()
    for operation, direction in dict.fromkeys((row["operation"], row["direction"]) for row in rows):
        kinds = [operation] if speed_ups(rows, operation, direction) else []
        kinds += ["roofline"] if operation == "cvfm" and any(row["roof_flops"] for row in rows) else []
        for kind in kinds:
            figure, axes = plt.subplots(layout="constrained")
            if kind == "roofline":
                _draw_roofline(axes, rows, direction)
            else:
                _draw_bars(axes, rows, operation, direction)
            where = f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['commit']}"
            axes.set_title(f"{operation}, {direction}: {where}", fontsize=9)
            axes.legend(fontsize=7)
            path = folder / f"{file.stem}_{kind}_{direction.replace('+', '_')}.svg"
            figure.savefig(path, metadata={"Date": None, "Description": f"made from {digest(file)}"})
            plt.close(figure)
            drawn.append(path)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Print each file's table, and draw its plots where a folder is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="CSV files of the bench")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    options = parser.parse_args(arguments)
    for file in options.files:
        rows = records.read(file)
        if not rows:
            print(f"{file} holds nothing", file=sys.stderr)
            return 1
        print(table(rows))
        if options.plots:
            print("\n".join(map(str, draw(file, options.plots))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed-up bars and a roofline chart, made from CSV files alone: `python -m bench.plots FILE... --out FOLDER`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import records
from bench.run import FILES, Row, by_case

WORDS = {"tuned_eager": "tuned eager (E1)", "naive_eager": "naive eager (E0)", "compile": "torch.compile (C)"}


def figure_tools() -> Any:
    """matplotlib's pyplot without a screen.

    Raises:
        SystemExit: naming the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'fila[dev]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def speed_ups(rows: list[Row], operation: str, direction: str) -> dict[str, dict[str, float]]:
    """{variant: {case: speed-up over the operation's baseline}}, timed ones only."""
    base = FILES[operation][1]
    found: dict[str, dict[str, float]] = {}
    for case, variants in by_case(rows, operation, direction).items():
        timed = {name: float(row["p50_ms"]) for name, row in variants.items() if row["p50_ms"]}
        for name, time in timed.items():
            if base in timed and name != base:
                found.setdefault(name, {})[case] = timed[base] / time
    return found


def bars(rows: list[Row], operation: str, direction: str, path: Path) -> bool:
    """Grouped bars, one group a case; False where there is nothing to draw."""
    found = speed_ups(rows, operation, direction)
    if not found:
        return False
    plt = figure_tools()
    cases = list(dict.fromkeys(case for values in found.values() for case in values))
    width = 0.8 / len(found)
    figure, axes = plt.subplots(figsize=(max(6, 0.35 * len(cases) * len(found) + 2), 4.5), layout="constrained")
    for number, (name, values) in enumerate(found.items()):
        places = [index + (number - (len(found) - 1) / 2) * width for index, case in enumerate(cases) if case in values]
        axes.bar(places, [values[case] for case in cases if case in values], width, label=WORDS.get(name, name))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
    base = FILES[operation][1]
    axes.set_ylabel(f"speed-up over {WORDS.get(base, base)}")
    axes.set_title(
        f"{operation}, {direction}: {rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['commit']}", fontsize=9
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def points(rows: list[Row], direction: str) -> dict[str, list[tuple[float, float]]]:
    """{variant: [(operations a byte, operations a second)]} of `cvfm`, by the floor's operations and bytes."""
    found: dict[str, list[tuple[float, float]]] = {}
    for variants in by_case(rows, "cvfm", direction).values():
        for name, row in variants.items():
            if row["p50_ms"] and row["roof_flops"]:
                flops = float(row["floor_flops"])
                place = (flops / float(row["floor_bytes"]), flops / (float(row["p50_ms"]) * 1e-3))
                found.setdefault(name, []).append(place)
    return found


def roofline(rows: list[Row], direction: str, path: Path) -> bool:
    """Achieved rate over intensity below the measured roof; False where no row has a roof."""
    found = points(rows, direction)
    if not found:
        return False
    plt = figure_tools()
    roofs = [(float(row["roof_flops"]), float(row["roof_bytes"])) for row in rows if row["roof_flops"]]
    rate, bandwidth = (sorted(roof[i] for roof in roofs)[len(roofs) // 2] for i in (0, 1))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    places = [x for values in found.values() for x, _ in values]
    edges = sorted([min(places) / 2, rate / bandwidth, max(places) * 2])
    axes.plot(edges, [min(rate, x * bandwidth) for x in edges], color="black", label="measured roof")
    for name, values in found.items():
        axes.scatter(*zip(*values, strict=True), s=16, label=WORDS.get(name, name))
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte (floor)", ylabel="FLOP/s")
    axes.set_title(f"cvfm, {direction}: {rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Draw everything that the files hold; prints what was written."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="CSV files of the benchmarks")
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.files:
        rows = records.read(file)
        if not rows:
            print(f"{file} holds nothing", file=sys.stderr)
            return 1
        for operation, direction in dict.fromkeys((row["operation"], row["direction"]) for row in rows):
            plain = direction.replace("+", "_")
            path = options.out / f"{file.stem}_{operation}_{plain}.png"
            if operation in FILES and bars(rows, operation, direction, path):
                print(path)
            path = options.out / f"{file.stem}_roofline_{plain}.png"
            if operation == "cvfm" and roofline(rows, direction, path):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

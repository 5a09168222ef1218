"""Speed-up bars and a roofline chart, made from CSV files alone: `python -m bench.plots FILE... --out FOLDER`.

Pictures are SVG with a digest of their CSV within, so that one can tell whether they are up to date.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from bench import records
from bench.run import FILES, Row, by_case

WORDS = {
    "tuned_eager": "tuned eager (E1)", "naive_eager": "naive eager (E0)", "compile": "torch.compile (C)",
    "library": "library calls (L)", "torch": "fila_kernels, torch", "native": "fila_kernels, native",
    "eager": "fila_kernels, eager", "triton": "fila_kernels, triton",
}  # fmt: skip
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


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
    # Text stays text, and one CSV makes one file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fila"})
    import matplotlib.pyplot

    return matplotlib.pyplot


def digest(file: Path) -> str:
    """What a picture says about the CSV that it was made from."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def source(picture: Path) -> str | None:
    """The digest that a picture holds."""
    found = re.search(r"made from (\S+ [0-9a-f]{12})", picture.read_text())
    return found and found[1]


def save(figure: Any, path: Path, file: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Description": f"made from {digest(file)}"})


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


def bars(rows: list[Row], operation: str, direction: str, path: Path, file: Path) -> bool:
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
    save(figure, path, file)
    plt.close(figure)
    return True


def points(rows: list[Row], direction: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """{(variant, dtype): [(operations a byte, operations a second)]} of `cvfm`, by the floor's operations and bytes."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case, variants in by_case(rows, "cvfm", direction).items():
        for name, row in variants.items():
            if row["p50_ms"] and row["roof_flops"]:
                flops = float(row["floor_flops"])
                place = (flops / float(row["floor_bytes"]), flops / (float(row["p50_ms"]) * 1e-3))
                found.setdefault((name, dtype_of(case)), []).append(place)
    return found


def dtype_of(case: str) -> str:
    return next(name for name in MARKERS if name in case.split("-"))


def roofline(rows: list[Row], direction: str, path: Path, file: Path) -> bool:
    """Achieved rate over intensity below each dtype's measured roof; False where no row has a roof."""
    found = points(rows, direction)
    if not found:
        return False
    plt = figure_tools()
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    places = [x for values in found.values() for x, _ in values]
    names = list(dict.fromkeys(name for name, _ in found))
    for dtype in dict.fromkeys(dtype for _, dtype in found):
        roofs = [
            (float(row["roof_flops"]), float(row["roof_bytes"]))
            for row in rows
            if row["roof_flops"] and row["operation"] == "cvfm" and dtype_of(row["case"]) == dtype
        ]
        rate, bandwidth = (sorted(roof[i] for roof in roofs)[len(roofs) // 2] for i in (0, 1))
        edges = sorted([min(places) / 2, rate / bandwidth, max(places) * 2])
        (line,) = axes.plot(edges, [min(rate, x * bandwidth) for x in edges], color="black", linewidth=1)
        line.set_linestyle("-" if dtype == "bfloat16" else "--")
        line.set_label(f"measured roof, {dtype}")
    for (name, dtype), values in found.items():
        colour = f"C{names.index(name)}"
        label = f"{WORDS.get(name, name)}, {dtype}"
        axes.scatter(*zip(*values, strict=True), s=16, color=colour, marker=MARKERS[dtype], label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte (floor)", ylabel="FLOP/s")
    axes.set_title(f"cvfm, {direction}: {rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path, file)
    plt.close(figure)
    return True


def draw(file: Path, out: Path) -> list[Path]:
    """Everything that a CSV holds, into a folder; returns the pictures' paths."""
    rows, drawn = records.read(file), []
    out.mkdir(parents=True, exist_ok=True)
    for operation, direction in dict.fromkeys((row["operation"], row["direction"]) for row in rows):
        plain = direction.replace("+", "_")
        path = out / f"{file.stem}_{operation}_{plain}.svg"
        if operation in FILES and bars(rows, operation, direction, path, file):
            drawn.append(path)
        path = out / f"{file.stem}_roofline_{plain}.svg"
        if operation == "cvfm" and roofline(rows, direction, path, file):
            drawn.append(path)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Draw everything that the files hold; prints what was written."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="CSV files of the benchmarks")
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    for file in options.files:
        drawn = draw(file, options.out)
        if not drawn:
            print(f"{file} holds nothing", file=sys.stderr)
            return 1
        print("\n".join(map(str, drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

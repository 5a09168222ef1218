"""Fills the generated parts of README and docs from committed files, so that no number in them is typed.

    python tools/documents.py           # rewrite what is between <!-- generated: NAME --> and <!-- end -->
    python tools/documents.py --check   # exit 1 where a document is out of date

Sources: `fila/pretrained/fila-nano/training/*.json` (held-out scores), `bench/results/*.csv` (times), the presets
(parameter counts), the bench's lists of columns, goals and sections. `fila ask --explain` draws README's picture, which
holds the answer and a digest of the checkpoint that gave it.
"""

import argparse
import csv
import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/kernels.md", "docs/model.md", "docs/nano.md")
RECORD = ROOT / "fila/pretrained/fila-nano/training"
CPU = ROOT / "bench/results/cvfm_cpu.csv"
CROP_RESIZE_CPU = ROOT / "bench/results/crop_resize_cpu.csv"
COMPILED = ROOT / "bench/results/compiled_kernels.csv"
EXPLAINED = ROOT / "docs/explained.png"
QUESTION = "examples/chart.png", "What is above the square?"
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def percent(tally: dict) -> str:
    return f"{tally['exact_match']:.1%} ({tally['low']:.0%} to {tally['high']:.0%})" if tally["count"] else "none"


def nano() -> str:
    """Held-out exact match."""
    score = json.loads((RECORD / "score.json").read_text())
    return (
        f"Exact match on {score['all']['count']} generated pages with font families and words it never saw, 95 % "
        "interval. *Cut*: a tile's edge runs through the answer.\n\n"
        + table(["", "answer intact", "answer cut"], [["`fila-nano`", percent(score["intact"]), percent(score["cut"])]])
    )


def explained() -> dict[str, str]:
    """The metadata that README's picture carries: question, answer, and the digest of its sources."""
    from PIL import Image

    if not EXPLAINED.exists():
        return {}
    with Image.open(EXPLAINED) as picture:
        return dict(picture.info)


def explained_from() -> str:
    """The digest of what README's picture is made from: weights, picture and question."""
    picture, question = QUESTION
    digest = hashlib.sha256(question.encode())
    for path in (ROOT / "fila/pretrained/fila-nano/model.safetensors", ROOT / picture):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def explain() -> None:
    """Draws README's picture by the command that README shows."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture, question = QUESTION
    command = [sys.executable, "-m", "fila", "ask", picture, question, "--json", "--explain", str(EXPLAINED)]
    said = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    info = PngInfo()
    for key, value in {"question": question, "answer": said["text"], "made from": explained_from()}.items():
        info.add_text(key, value)
    with Image.open(EXPLAINED) as drawn:
        # Three quarters of the size, in a palette: small in the repository, sharp enough to read.
        small = drawn.convert("RGB").resize((drawn.width * 3 // 4, drawn.height * 3 // 4), Image.Resampling.LANCZOS)
    small.quantize(128, dither=Image.Dither.NONE).save(EXPLAINED, pnginfo=info, optimize=True)


def answer() -> str:
    """The output of README's command."""
    return f"```text\n{explained().get('answer')}\n```\n"


def kinds() -> str:
    """The held-out score by kind of question."""
    score = json.loads((RECORD / "score.json").read_text())
    rows = [[kind, percent(sides["intact"]), percent(sides["cut"])] for kind, sides in score["kinds"].items()]
    return table(["question", "intact", "cut"], rows)


def training() -> str:
    """Each stage's steps and its losses, first and last, from the logs of the stages that ran."""
    rows = []
    for stage in ("text", "vision", "align", "tune"):
        log = RECORD / f"{stage}.csv"
        if not log.exists():
            continue
        with log.open(newline="") as file:
            first, *_, last = csv.DictReader(file)
        losses = [f"{part} {first[part]} to {last[part]}" for part in list(first)[1 : list(first).index("norm")]]
        rows.append([f"`{stage}`", last["step"], ", ".join(losses)])
    return "| stage | steps of 8 pages | losses over the first and the last steps |\n| --- | ---: | --- |\n" + "".join(
        f"| {' | '.join(row)} |\n" for row in rows
    )


def parameters() -> str:
    """Parameters by part of every preset, counted on the meta device."""
    import torch

    from fila import FilaForConditionalGeneration
    from fila.configuration import PRESETS

    columns = []
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = FilaForConditionalGeneration(preset())
        inner, tower = model.model, model.model.vision_tower
        parts = {
            "ViT": [tower.vit],
            "ConvNeXt": [tower.convnext],
            "CVFM (fusion)": [tower.fusion],
            "projector and newline": [inner.multi_modal_projector],
            "language model": [inner.language_model, model.lm_head],
            "all": [model],
        }
        counts = {
            part: sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
            for part, modules in parts.items()
        }
        counts["projector and newline"] += inner.image_newline.numel()
        columns.append(counts)
    rows = [[part, *(f"{counts[part]:,}" for counts in columns)] for part in columns[0]]
    return table(["part", *(f"`{name}`" for name in PRESETS)], rows)


def cpu_ratios() -> tuple[dict[str, str], dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """A row of the CPU's record; tuned eager's time over ours, and our share of its memory, by shape and direction."""
    from bench import records

    rows = records.read(CPU)
    found = {(row["workload"], row["direction"], row["variant"]): row for row in rows}
    keys = list(dict.fromkeys((row["workload"], row["direction"]) for row in rows))
    pairs = {key: (found[*key, "tuned_eager"], found[*key, "native"]) for key in keys}
    times = {key: float(eager["p50_ms"]) / float(own["p50_ms"]) for key, (eager, own) in pairs.items()}
    memory = {
        key: float(own["extra_memory_bytes"]) / float(eager["extra_memory_bytes"])
        for key, (eager, own) in pairs.items()
    }
    return rows[0], times, memory


def mean_of(ratios: dict[tuple[str, str], float], direction: str) -> float:
    return statistics.geometric_mean(value for key, value in ratios.items() if key[1] == direction)


def headline() -> str:
    """The two numbers of README."""
    first, times, _ = cpu_ratios()
    shapes = len({workload for workload, _ in times})
    forward, both = mean_of(times, "forward"), mean_of(times, "forward+backward")
    return (
        f"On a CPU ({first['device']}, {first['threads']} threads) CVFM is **{forward:.2f} times** as fast as tuned "
        f"eager PyTorch forward and **{both:.2f} times** forward and backward, geometric means over {shapes} shapes "
        "([all of them](docs/benchmarks.md#on-a-cpu)). On a GPU: not measured.\n"
    )


def cpu() -> str:
    """Speed-up over tuned eager and share of its memory on a CPU, by shape and direction."""
    first, times, memory = cpu_ratios()
    directions = list(dict.fromkeys(direction for _, direction in times))
    lines = [
        [workload, *(f"{times[workload, d]:.2f}x, {memory[workload, d]:.2f}" for d in directions)]
        for workload in dict.fromkeys(workload for workload, _ in times)
    ]
    means = [f"**{mean_of(times, d):.2f}x, {mean_of(memory, d):.2f}**" for d in directions]
    return (
        f"Speed-up and share of eager's extra memory; {first['device']}, {first['threads']} threads, "
        f"torch {first['torch']}, medians of {first['rounds']} interleaved rounds, commit {first['commit']}.\n\n"
        + table(["raster, stage, dtype", *directions], [*lines, ["geometric mean", *means]])
    )


def native() -> str:
    """The native backend's speed-up on a CPU over the eager one and over slices."""
    from bench import goals, records

    rows = records.read(CPU) + records.read(CROP_RESIZE_CPU)
    timed = {(r["operation"], r["workload"], r["direction"], r["variant"]): r for r in rows if r["p50_ms"]}

    def ratio(operation: str, workload: str, direction: str, slow: str) -> float:
        base, own = timed[operation, workload, direction, slow], timed[operation, workload, direction, "native"]
        return float(base["p50_ms"]) / float(own["p50_ms"])

    def floor_share(workload: str, variant: str) -> float:
        row = timed["cvfm", workload, "forward", variant]
        return goals.floor_ms(row) / float(row["p50_ms"])

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figures = [
        [
            ratio("cvfm", workload, "forward", "eager"),
            floor_share(workload, "eager"),
            floor_share(workload, "native"),
            ratio("crop_resize", workload, "forward", "sliced"),
            ratio("crop_resize", workload, "backward", "sliced"),
        ]
        for workload in workloads
    ]
    means = [statistics.geometric_mean(column) for column in zip(*figures, strict=True)]

    def line(name: str, values: list[float]) -> list[str]:
        faster, calls, own, *alone = values
        return [name, f"{faster:.2f}x", f"{calls:.2f}", f"{own:.2f}", *(f"{value:.1f}x" for value in alone)]

    head = [
        "raster, stage, dtype", "fused forward over eager", "floor over eager", "floor over fused",
        "crop_resize over slices", "its backward over slices",
    ]  # fmt: skip
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, medians of interleaved rounds, "
        f"commit {commits}.\n\n" + table(head, [*map(line, workloads, figures), line("geometric mean", means)])
    )


def columns() -> str:
    """The columns of the benchmarks' CSV."""
    from bench.records import COLUMNS

    return "| Column | Meaning |\n| --- | --- |\n" + "".join(f"| `{n}` | {what} |\n" for n, what in COLUMNS.items())


def sections() -> str:
    """The sections that `make gpu` runs."""
    from tools.gpu.sections import SECTIONS

    rows = [f"| {s.run} | `{s.name}` | {s.limit} s | {s.what} |\n" for s in SECTIONS]
    return "| Run | Section | At most | What |\n| --- | --- | ---: | --- |\n" + "".join(rows)


def compiled() -> str:
    """The number of kernels that each Triton compiled for each architecture, and their faults."""
    with COMPILED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["triton"], row["arch"], row["dtype"]), []).append(row)
    lines = []
    for (version, arch, dtype), group in sorted(groups.items(), key=lambda entry: (entry[0][0], int(entry[0][1]))):
        faults = [row["faults"] for row in group if row["faults"]]
        registers = max(int(row["registers"]) for row in group if row["registers"])
        specialised = sum("specialised" in row["options"] for row in group)
        lines.append(
            [f"{version}, sm_{arch}, {dtype}", str(len(group)), str(specialised), str(registers), str(len(faults))]
        )
    head = ["Triton, architecture", "kernels", "of them warp-specialised", "most registers", "not as intended"]
    return table(head, lines)


def kernels() -> str:
    """Registers, shared memory and occupancy of the default configs, by the newest Triton of the record."""
    with COMPILED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == "default"]
    newest = max((row["triton"] for row in rows), key=lambda version: tuple(map(int, version.split("."))))
    head = ["Kernel", "Architecture", "Tile", "Warps", "Stages", "Registers", "Spills", "Shared memory", "Occupancy"]
    lines = [
        [
            f"`{row['kernel']}`", f"sm_{row['arch']}", row["tile"], row["warps"], row["stages"], row["registers"],
            row["spills"], f"{int(row['shared']):,} B", f"{float(row['occupancy']):.0%}",
        ]
        for row in sorted(rows, key=lambda row: (int(row["arch"]), row["kernel"]))
        if row["triton"] == newest
    ]  # fmt: skip
    return f"By Triton {newest}, in {rows[0]['dtype']}.\n\n" + table(head, lines)


def goals() -> str:
    """The goals on a GPU beside what the committed CSVs of GPUs say."""
    from bench import records
    from bench.goals import lines

    files = [path for path in sorted(CPU.parent.glob("cvfm_*.csv")) if path != CPU]
    if not files:
        return table(["", "must", "aim", "measured"], lines([]))
    parts = []
    for path in files:
        rows = records.read(path)
        where = f"{rows[0]['device']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}"
        parts.append(f"{where}:\n\n{table(['', 'must', 'aim', 'measured'], lines(rows))}")
    return "\n".join(parts)


GENERATORS: dict[str, Callable[[], str]] = {
    "answer": answer, "headline": headline, "nano": nano, "kinds": kinds, "cpu": cpu, "native": native,
    "parameters": parameters, "columns": columns, "sections": sections, "goals": goals, "training": training,
    "compiled": compiled, "kernels": kernels,
}  # fmt: skip


def filled(text: str) -> str:
    """The document with every generated part made anew."""

    def fill(match: re.Match) -> str:
        if match[2] not in GENERATORS:
            raise ValueError(f"expected a generated part out of {', '.join(GENERATORS)}, got {match[2]!r}")
        return match[1] + GENERATORS[match[2]]() + match[3]

    return PART.sub(fill, text)


def stale_plots() -> list[Path]:
    """CSVs whose pictures in docs/plots are of other numbers, or not there."""
    from bench import report

    found = []
    for file in sorted(CPU.parent.glob("cvfm_*.csv")):
        pictures = list((ROOT / "docs" / "plots").glob(f"{file.stem}_*.svg"))
        if not pictures or {report.source(picture) for picture in pictures} != {report.digest(file)}:
            found.append(file)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a document is out of date")
    args = parser.parse_args(argv)
    stale = []
    if explained().get("made from") != explained_from():
        stale.append(str(EXPLAINED.relative_to(ROOT)))
        if not args.check:
            explain()
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(name)
            if not args.check:
                path.write_text(new)
    for file in stale_plots():
        stale.append(f"docs/plots/{file.stem}_*.svg")
        if not args.check:
            from bench import report

            report.draw(file, ROOT / "docs" / "plots")
    if stale:
        print(f"{'out of date' if args.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

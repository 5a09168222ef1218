"""Draws the architecture from the imports into docs/architecture.svg, and checks that no arrow runs up or in a circle.

    python tools/architecture.py           # check, then draw
    python tools/architecture.py --check   # exit 1 for an arrow that runs up, a circle, or an outdated picture
    python tools/architecture.py --list    # print every arrow between rooms, with the imports behind it

Every import counts: at the top level, inside a function, under TYPE_CHECKING, and `importlib.import_module`. LAYERS and
EXTERNAL are the only places that say what may import what.
"""

import argparse
import ast
import graphlib
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.layered_picture import Box, Panel, render  # noqa: E402

PICTURE = ROOT / "docs" / "architecture.svg"

# From top to bottom; a room imports rooms of lower rows only. A room is a module or a package within the named package,
# "__init__" the package's public names. Packages import lower packages only.
PACKAGES = (("tools",), ("bench",), ("recipes", "examples"), ("fila",), ("fila_kernels",))
LAYERS = {
    "fila": (
        ("commands", "__main__"),
        ("", "cli"),
        ("", "aot"),
        ("training", "training"),
        ("answers", "inference visualize"),
        ("", "confidence legibility"),
        ("weights", "checkpoints"),
        ("public names", "__init__"),
        ("model", "modeling"),
        ("encoder", "vision"),
        ("inputs", "processing fusion"),
        ("", "image_processing"),
        ("", "resampling"),
        ("settings", "configuration images"),
        ("", "image_samples"),
        ("", "image_files"),
        ("base", "geometry settings chat errors startup streams"),
    ),
    "fila_kernels": (
        ("public names", "__init__ info aot testing"),
        ("", "module rounding"),
        ("functions", "functional"),
        ("derivatives", "autograd flops"),
        ("operators", "ops"),
        ("choice", "planner"),
        ("", "dispatch tuned"),
        ("backends", "backends.triton backends.native backends.eager"),
        ("", "backends.products"),
        ("definition", "validation reference sampling"),
        ("base", "call"),
    ),
}

# Packages from outside that a package may import.
EXTERNAL = {
    "fila": {"torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "safetensors", "PIL", "jinja2"},
    "fila_kernels": {"torch", "numpy", "triton"},
}
# And optional ones, which one room alone may import; YAML comes with transformers.
OPTIONAL = {"fila.training": {"accelerate", "pyarrow", "yaml"}}


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name and file of every module of PACKAGES; a package's name stands for its `__init__`."""
    found = {}
    for package in (name for row in PACKAGES for name in row):
        for path in sorted((root / package).rglob("*.py")):
            if "pretrained" in path.parts:  # a checkpoint is data; its file names the package for transformers
                continue
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if parts[-1] != "__init__" or has_code(path):
                found[name] = path
    return found


def has_code(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def imported_names(path: Path, name: str) -> set[str]:
    """Absolute names of everything that a file imports, at any depth; `a.*` stands for every module of `a`."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
                found.add(f"{argument.values[0].value}*")
            elif isinstance(argument, ast.Constant):
                found.add(str(argument.value))
    return found


def read_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules that every module imports."""
    modules = find_modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for target in imported_names(path, name):
            if target.endswith("*"):
                found |= {module for module in modules if module.rpartition(".")[0] + "." == target[:-1]}
                continue
            while target and target not in modules:  # `from module import name` names more than the module
                target = target.rpartition(".")[0]
            found |= {target} - {""}
        graph[name] = found - {name}
    return graph


def room_of(module: str) -> str | None:
    """The room of LAYERS that holds a module; None where no row names it. Other packages are one room each."""
    package, _, rest = module.partition(".")
    if package not in LAYERS:
        return package
    parts = (rest or "__init__").split(".")
    rooms = {room for _, names in LAYERS[package] for room in names.split()}
    inner = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in rooms), None)
    return inner and f"{package}.{inner}"


def ranks() -> dict[str, int]:
    """The height of every room, counted from the top."""
    found: dict[str, int] = {}
    height = 0
    for row in PACKAGES:
        for package in row:
            for step, (_, names) in enumerate(LAYERS.get(package, ())):
                found |= {f"{package}.{room}": height + step for room in names.split()}
            if package not in LAYERS:
                found[package] = height
        height += max(len(LAYERS.get(package, ("",))) for package in row)
    return found


def arrows(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """The imports behind every arrow from one room to another."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            ends = room_of(module), room_of(target)
            if ends[0] != ends[1] and ends[0] and ends[1]:
                found[ends[0], ends[1]].append(f"{module} imports {target}")
    return dict(found)


def faults(graph: dict[str, set[str]], root: Path = ROOT) -> list[str]:
    """Modules without a room, rooms without a module, arrows that run up, foreign packages, circles."""
    found = [f"{module} is in no row of LAYERS" for module in sorted(graph) if room_of(module) is None]
    height = ranks()
    found += [f"{room}: LAYERS names no module" for room in height if room not in {room_of(module) for module in graph}]
    for (above, below), imports in arrows(graph).items():
        if height[above] >= height[below]:
            found += [f"{line}, which does not lie in a lower row" for line in imports]
    for module, path in sorted(find_modules(root).items()):
        package = module.partition(".")[0]
        if package not in EXTERNAL:
            continue
        own = {name for row in PACKAGES for name in row}
        names = {name.partition(".")[0] for name in imported_names(path, module)}
        allowed = EXTERNAL[package] | OPTIONAL.get(room_of(module) or "", set())
        strangers = names - own - allowed - sys.stdlib_module_names
        found += [f"{module} imports {name}, which {package} does not require" for name in sorted(strangers)]
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        found.append("a circle: " + " imports ".join(reversed(error.args[1])))
    return found


# What the picture says of each package, and its colour.
SENTENCES = {
    "fila": ("the model, on transformers; imports fila_kernels", "#0f766e"),
    "fila_kernels": ("the operation CVFM; imports torch, numpy and triton only", "#1d4ed8"),
}


def draw(graph: dict[str, set[str]]) -> str:
    """The picture of a graph: the packages around the two as boxes of one room, those two row by row."""
    height = ranks()
    edges = {(a, b) for a, b in arrows(graph) if height[a] < height[b]}
    around = [[name for name in row if name not in LAYERS] for row in PACKAGES]
    outer = {tuple(end.split(".")[0] for end in edge) for edge in edges}
    panels = [
        Panel(
            "around",
            "uses the two packages; neither imports it",
            "#7c3aed",
            [("", [Box(name) for name in row]) for row in around if row],
            {(a, b) for a, b in outer if a not in LAYERS and b not in LAYERS and a != b},
        )
    ]
    for package, rows in LAYERS.items():
        sentence, colour = SENTENCES[package]
        boxes = [(label, [make_box(package, room, graph) for room in names.split()]) for label, names in rows]
        inner = {
            (shown(a), shown(b)) for a, b in edges if a.startswith(f"{package}.") and b.startswith(f"{package}.")
        }  # fmt: skip
        panels.append(Panel(package, sentence, colour, boxes, inner))
    entered = sorted({shown(b) for a, b in edges if a.startswith("fila.") and b.startswith("fila_kernels.")})
    users = sorted({a for a, b in outer if b in LAYERS and a not in LAYERS})
    return render(
        panels,
        "Drawn from the imports by tools/architecture.py. An arrow leads to what is imported; arrows that others imply "
        "are left out.",
        {"fila": f"imported by {', '.join(users)}", "fila_kernels": f"fila imports {', '.join(entered)}"},
    )


def shown(room: str) -> str:
    return room.partition(".")[2].replace("__init__", room.partition(".")[0])


def make_box(package: str, room: str, graph: dict[str, set[str]]) -> Box:
    name = f"{package}.{room}"
    files = sorted(module.removeprefix(f"{name}.") for module in graph if module.startswith(f"{name}."))
    return Box(shown(name), files)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 for a fault or an outdated picture"
    )
    parser.add_argument("--list", action="store_true", help="print every arrow and the imports behind it")
    options = parser.parse_args(argv)
    graph = read_graph()
    if options.list:
        for (above, below), imports in sorted(arrows(graph).items()):
            print(f"{above} > {below}", *imports, sep="\n    ")
        return 0
    found = faults(graph)
    picture = draw(graph)
    if options.check and (not PICTURE.exists() or PICTURE.read_text() != picture):
        found.append(f"{PICTURE.relative_to(ROOT)} is out of date: python tools/architecture.py draws it")
    if not options.check:
        PICTURE.write_text(picture)
    print("\n".join(found) or "every arrow leads down")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

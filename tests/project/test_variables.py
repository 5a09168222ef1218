"""CONTRIBUTING's table of environment variables: every variable that the sources read, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fila", "fila_kernels", "csrc", "bench", "recipes", "examples", "tools", "tests")


def read_in_python(source: str) -> set[str]:
    """Names given to `os.environ` and `os.getenv`, constants resolved, and tuples named `...VARIABLES`."""
    tree = ast.parse(source)
    constants: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            tupled = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
            values = node.value.elts if tupled else [node.value]
            for target, value in zip(targets, values, strict=False):
                if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    constants[target.id] = value.value
                elif isinstance(target, ast.Name) and target.id.endswith("VARIABLES") and isinstance(value, ast.Tuple):
                    found |= {v.value for v in value.elts if isinstance(v, ast.Constant)}
    for node in ast.walk(tree):
        names: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            names = node.args[:1]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            names = [] if isinstance(node.ctx, ast.Store) else [node.slice]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            names = [node.left]
        for name in names:
            if isinstance(name, ast.Constant):
                found.add(name.value)
            else:
                found |= {constants[part] for part in re.findall(r"\w+", ast.unparse(name)) if part in constants}
    return found


def read_elsewhere(name: str, source: str) -> set[str]:
    """Names in CMake's `$ENV{NAME}`, C++'s `getenv("NAME")` and a Makefile's `NAME ?=`."""
    found = set(re.findall(r"\$ENV\{(\w+)\}", source)) | set(re.findall(r'getenv\("(\w+)"\)', source))
    return found | (set(re.findall(r"^(\w+) \?=", source, re.MULTILINE)) if name == "Makefile" else set())


def read_by_sources() -> set[str]:
    files = [ROOT / name for name in ("setup.py", "Makefile", "CMakeLists.txt")]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    found: set[str] = set()
    for path in files:
        if path.suffix == ".py":
            found |= read_in_python(path.read_text())
        elif path.suffix in (".cmake", ".txt", ".cpp", ".h", ".cu") or path.name == "Makefile":
            found |= read_elsewhere(path.name, path.read_text())
    return found


def listed() -> set[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Environment variables\n")[2].partition("\n## ")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_every_variable_that_is_read_is_listed_and_no_other():
    assert listed() == read_by_sources()


def test_every_way_to_read_a_variable_is_found():
    source = (
        'import os\nNAME, OTHER = "A", "B"\nSOME_VARIABLES = ("C", NAME)\nos.environ.get(NAME)\nos.getenv("D")\n'
        'os.environ["E"]\nos.environ["WRITTEN"] = "1"\n"F" in os.environ\n"G" not in os.environ\n'
    )
    assert read_in_python(source) == {"A", "C", "D", "E", "F", "G"}
    assert read_elsewhere("Makefile", "X ?= 1\nY := 2\n") == {"X"}
    assert read_elsewhere("a.cmake", 'set(A "$ENV{B}")') == {"B"}
    assert read_elsewhere("a.cpp", 'std::getenv("C")') == {"C"}

"""The project's frame: pins, the set-up script, what an install holds with and without a compiler, who imports whom."""

import ast
import graphlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def load_environment_script():
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load_environment_script()
PINS = environment.read_pins((ROOT / "constraints.txt").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
def test_every_requirement_has_a_pin_in_its_range(line):
    requirement = Requirement(line)
    assert requirement.name in PINS, f"constraints.txt does not pin {requirement.name}"
    assert Version(PINS[requirement.name]) in requirement.specifier


def test_read_pins_normalises_names_and_ignores_comments():
    assert environment.read_pins("# a==1\nHuggingface_Hub==2.0 # why\n\nx>=3\n") == {"huggingface-hub": "2.0"}


@pytest.mark.parametrize(
    ("setting", "has_driver", "build"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_the_build_of_torch_follows_setting_and_driver(setting, has_driver, build):
    assert environment.choose_build(setting, has_driver) == build


def test_an_unknown_build_is_refused():
    with pytest.raises(SystemExit, match="expected auto, cpu or cuda, got 'rocm'"):
        environment.choose_build("rocm", False)


def test_an_environment_with_another_torch_keeps_what_it_holds():
    pins = {"torch": "2.13.0", "triton": "3.7.1", "ruff": "0.1", "setuptools": "84.2.1"}
    assert environment.merge_pins(pins, {}) == pins
    assert environment.merge_pins(pins, {"torch": "2.13.0+cpu", "triton": "3.6.0"}) == pins
    kept = environment.merge_pins(pins, {"torch": "2.11.0+cu128", "triton": "3.6.0", "setuptools": "75.0"})
    assert kept == {"torch": "2.11.0+cu128", "triton": "3.6.0", "ruff": "0.1"}


def test_the_environment_script_is_readable_to_old_pythons():
    """It is the one that says a Python is too old, so it must not die of a syntax error first."""
    source = (ROOT / "tools" / "environment.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    assert "from __future__ import annotations" in source


def test_the_environment_script_sees_what_changed(monkeypatch, tmp_path):
    before = environment.fingerprint()
    assert environment.fingerprint() == before
    changed = tmp_path / "constraints.txt"
    changed.write_text((ROOT / "constraints.txt").read_text() + "x==1\n")
    monkeypatch.setattr(environment, "CONSTRAINTS", changed)
    changed_constraints = environment.fingerprint()
    assert changed_constraints != before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert environment.fingerprint() != changed_constraints


def make_targets() -> list[str]:
    return re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", make_targets())
def test_make_target_is_documented_and_sets_up_first(target):
    help_text = subprocess.check_output(["make", "-s", "help"], cwd=ROOT, text=True)
    assert re.search(rf"^make {target} ", help_text, flags=re.MULTILINE)
    plan = subprocess.check_output(["make", "-n", "--no-print-directory", target], cwd=ROOT, text=True)
    if ".venv/bin/" in plan:
        assert "tools/environment.py" in plan.splitlines()[0]


def test_ci_runs_what_the_readme_tells_a_newcomer():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in script
    assert "make lint" in script
    assert "make demo" in script
    assert sum(int(seconds) for seconds in re.findall(r"^step (\d+)", script, flags=re.MULTILINE)) < 30 * 60


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """A source distribution, made as `python -m build --sdist` makes it and unpacked; it holds no build."""
    folder = tmp_path_factory.mktemp("source")
    checkout = folder / "checkout"
    for name in ("fila", "fila_kernels", "csrc", "examples", "bench", "tests", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "lib", "out"))
    for path in (
        path for path in ROOT.iterdir() if path.is_file() and path.suffix in ("", ".toml", ".py", ".txt", ".md", ".in")
    ):
        shutil.copy2(path, checkout / path.name)
    (checkout / "fila_kernels" / "lib").mkdir()
    (checkout / "fila_kernels" / "lib" / "libfila_kernels.so").write_text("of another machine")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def files_of(root: Path, folder: str) -> set[str]:
    found = (path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file())
    return {str(path) for path in found if not {"__pycache__", "lib"} & set(path.parts)}


def test_source_distribution_holds_all_that_a_build_and_its_tests_need(source_copy):
    for folder in ("fila", "fila_kernels", "csrc", "examples/cpp", "bench", "tests", "tools"):
        missing = files_of(ROOT, folder) - files_of(source_copy, folder)
        assert not missing, f"missing in the source distribution: {sorted(missing)}"
    assert not (source_copy / "fila_kernels" / "lib").exists()


def build_wheel(source: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(source),
    ]
    # Kernels for a GPU take minutes to compile; test_cuda_build.py builds some of them.
    variables = {"FILA_KERNELS_BUILD_CUDA": "0", **variables}
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def only_wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler")
def test_wheel_with_a_compiler_holds_library_and_data(source_copy, tmp_path):
    done = build_wheel(source_copy, tmp_path, FILA_KERNELS_BUILD_NATIVE="1")
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tmp_path)
    names = set(wheel.namelist())
    assert "-py3-none-linux_" in Path(wheel.filename).name
    assert "fila_kernels/lib/libfila_kernels.so" in names
    assert str(source_copy).encode() not in wheel.read("fila_kernels/lib/libfila_kernels.so")
    data = files_of(ROOT, "fila") | files_of(ROOT, "fila_kernels")
    assert not data - names, f"missing in the wheel: {sorted(data - names)}"
    assert not [name for name in names if name.startswith(("tests/", "bench/", "tools/"))]


def test_wheel_without_a_compiler_works_and_says_why(source_copy, tmp_path):
    done = build_wheel(source_copy, tmp_path, CXX="/bin/false", FILA_KERNELS_BUILD_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tmp_path)
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")
    assert wheel.read("fila_kernels/lib/not_built.txt").strip()
    installed = tmp_path / "installed"
    wheel.extractall(installed)
    code = (
        "import torch, fila_kernels, fila_kernels.native as n; loaded, why = n.load(); assert not loaded; print(why);"
        "print(fila_kernels.crop_resize(torch.ones(1, 4, 4, 2), torch.tensor([[0., 0., 4., 4.]]),"
        "torch.tensor([0]), 2).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "not built: " in run.stdout
    assert "[1, 2, 2, 2]" in run.stdout


def test_a_demanded_library_that_cannot_be_built_is_an_error(source_copy, tmp_path):
    done = build_wheel(source_copy, tmp_path, CXX="/bin/false", FILA_KERNELS_BUILD_NATIVE="1")
    assert done.returncode != 0
    assert "FILA_KERNELS_BUILD_NATIVE=1, but: " in done.stdout + done.stderr


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports when it is itself imported."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_of(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    }


def test_the_kernels_know_nothing_of_the_model():
    allowed = {*sys.stdlib_module_names, "fila_kernels", "torch", "numpy", "triton"}
    for path in (ROOT / "fila_kernels").rglob("*.py"):
        strangers = {name.split(".")[0] for name in imports_of(path)} - allowed
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


@pytest.mark.parametrize("package", ["fila", "fila_kernels"])
def test_no_import_runs_in_a_circle(package):
    modules = modules_of(package)
    graph = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"{package}: {' -> '.join(error.args[1])}")


def test_nothing_in_the_repository_is_too_large():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    sizes = {name: (ROOT / name).stat().st_size for name in listing.split("\0") if (ROOT / name).is_file()}
    large = {name: size for name, size in sizes.items() if size > 16 * 2**20}
    assert not large, f"files above 16 MiB: {large}"

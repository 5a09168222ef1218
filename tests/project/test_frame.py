"""The project's frame: pins, the set-up script, and what an installation holds with and without a compiler."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
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
    tree = ast.parse(source, feature_version=(3, 7))
    assert "from __future__" not in source
    for node in ast.walk(tree):  # evaluated when a function is defined: names alone are known to every Python
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            assert annotation is None or isinstance(annotation, ast.Name | ast.Constant), ast.unparse(annotation)


def test_the_environment_script_watches_the_variables_of_the_build():
    spec = importlib.util.spec_from_file_location("fila_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert {*environment.BUILD_VARIABLES} == {*setup.VARIABLES, setup.NATIVE} - {"PATH"}


def test_the_environment_script_sees_what_changed(monkeypatch, tmp_path):
    before = environment.fingerprint()
    assert environment.fingerprint() == before
    changed = tmp_path / "constraints.txt"
    changed.write_text((ROOT / "constraints.txt").read_text() + "x==1\n")
    monkeypatch.setattr(environment, "CONSTRAINTS", changed)
    changed_constraints = environment.fingerprint()
    assert changed_constraints != before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    changed_variable = environment.fingerprint()
    assert changed_variable != changed_constraints
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.fingerprint() != changed_variable, "a compiler that was installed since"


# Stands for the Python of an environment: pip's answers are chosen by the test.
PYTHON = """#!/bin/sh
case "$*" in
  *--version*) exit 0;;
  *version_info*) exit {too_old};;
  *"pip list"*) echo '[]';;
  *"pip install"*) echo {output!r}; exit {status};;
esac
"""


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """Runs the script's `main` over an environment whose Python is the one above; returns the environment."""

    def run(status: int = 0, output: str = "", too_old: int = 0) -> "environment.Environment":
        python = tmp_path / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(PYTHON.format(status=status, output=output, too_old=too_old))
        python.chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path)])
        environment.main()
        return environment.Environment(tmp_path)

    return run


def test_a_set_up_that_fails_is_not_current_afterwards(set_up, tmp_path, monkeypatch):
    found = set_up()
    assert found.is_current()
    monkeypatch.setenv("CXX", "another")
    with pytest.raises(SystemExit, match="pip could not install"):
        set_up(status=1)
    monkeypatch.delenv("CXX")
    assert not found.is_current(), "the failed attempt may have removed what the stamp stood for"
    assert set_up().is_current()


def test_a_library_that_went_or_a_torn_stamp_is_not_current(set_up, tmp_path, monkeypatch):
    found = set_up()
    monkeypatch.setattr(environment, "LIBRARY", tmp_path if not environment.LIBRARY.exists() else tmp_path / "none")
    assert not found.is_current()
    monkeypatch.undo()
    for torn in ("", '{"fingerprint": "', "[]", "\0"):
        found.stamp.write_text(torn)
        assert not found.is_current()


@pytest.mark.parametrize(
    "output",
    [
        "WARNING: Retrying after connection broken by NewConnectionError: refused\nERROR: conflicting dependencies",
        "WARNING: Retrying after connection broken by ProxyError\nERROR: No matching distribution found for torch",
    ],
)
def test_a_missing_network_is_named(set_up, capsys, output):
    with pytest.raises(SystemExit, match=r"^setup: no connection to the package registry.* pip said: .*broken by"):
        set_up(status=1, output=output)
    assert "ERROR" not in capsys.readouterr().err, "pip's conclusion misleads"


def test_another_failure_of_pip_keeps_its_message(set_up, capsys):
    with pytest.raises(SystemExit, match=r"^setup: pip could not install .*; its message is above"):
        set_up(status=1, output="ERROR: No space left on device")
    assert "No space left" in capsys.readouterr().err


def test_an_environment_of_an_old_python_is_refused(set_up):
    with pytest.raises(SystemExit, match=r"^setup: expected Python 3\.11 or newer in .*, got an older one; remove"):
        set_up(too_old=1)


def test_an_environment_that_cannot_be_written_to_is_named(set_up, monkeypatch, tmp_path):
    exists = Path.exists

    def refuse(path, *arguments, **options):
        if tmp_path not in path.parents:
            return exists(path)
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("touch", "exists"):  # a folder that can be read, and one that cannot
        with monkeypatch.context() as denied:
            denied.setattr(Path, method, refuse)
            with pytest.raises(SystemExit, match=r"is out of date and cannot be written to .Permission denied.; make"):
                set_up()


def test_a_missing_network_is_named_by_pip_itself(tmp_path):
    """Also under PIP_RETRIES=0, where pip would say that dependencies conflict."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    code = "import sys; from tools import environment as e; e.Environment(e.Path(sys.argv[1])).install({}, 'no-such')"
    variables = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**os.environ, **variables}, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"setup: no connection to the package registry")
    assert done.stderr.count(b"\n") == 1


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


# Entries of a checkout beside the project's files: .gitignore's and git's own folder.
NOT_SOURCES = (
    ".git", ".venv", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks", ".cache", "build",
    "dist", "runs", "data", "out", "lib", "compile_commands.json", ".coverage",
)  # fmt: skip


def files_of(root: Path, folder: str = ".") -> set[str]:
    found = (path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file())
    return {str(path) for path in found if not any(fnmatch(part, n) for part in path.parts for n in NOT_SOURCES)}


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """A source distribution, made as `python -m build --sdist` makes it and unpacked; it holds no build."""
    folder = tmp_path_factory.mktemp("source")
    checkout = folder / "checkout"
    for name in files_of(ROOT):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    for built in ("fila_kernels/lib/libfila_kernels.so", "examples/out/drawn.png"):
        (checkout / built).parent.mkdir()
        (checkout / built).write_text("of another machine")
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


def test_source_distribution_holds_what_the_repository_holds(source_copy):
    """Nothing less, since `make demo`, `make test` and `make lint` have to work in it; and no build."""
    missing = files_of(ROOT) - files_of(source_copy)
    assert not missing, f"missing in the source distribution: {sorted(missing)}"
    for name in ("examples/receipt.png", "recipes/nano/pages/fonts.json", ".ci/run", "docs/index.md"):
        assert (source_copy / name).is_file()
    assert not (source_copy / "fila_kernels" / "lib").exists()
    assert not (source_copy / "examples" / "out").exists()


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
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fila", "fila_kernels"}


def test_wheel_without_a_compiler_works_and_says_why(source_copy, tmp_path):
    done = build_wheel(source_copy, tmp_path, CXX="/bin/false", FILA_KERNELS_BUILD_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tmp_path)
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")
    assert wheel.read("fila_kernels/lib/not_built.txt").strip()
    installed = tmp_path / "installed"
    wheel.extractall(installed)
    code = (
        "import torch, fila_kernels, fila_kernels.backends.native.library as n;"
        "loaded, why = n.load(); assert not loaded; print(why);"
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


def test_nothing_in_the_repository_is_too_large():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    sizes = {name: (ROOT / name).stat().st_size for name in listing.split("\0") if (ROOT / name).is_file()}
    large = {name: size for name, size in sizes.items() if size > 16 * 2**20}
    assert not large, f"files above 16 MiB: {large}"

"""Runs tests on other versions of a dependency: the oldest supported, the pinned one, and for some the newest.

    python tools/versions.py transformers           # the model's tests: make test-transformers
    python tools/versions.py triton                 # the kernels', interpreted and compiled, timed: make test-triton
    python tools/versions.py triton --configs       # every config that the tuner would try, compiled: make test-aot
    python tools/versions.py triton 3.6.0           # one version

A version other than the installed one goes, with what it asks for, into a folder under `.venv/` that precedes the
environment's own packages on the path; torch and the rest are shared.
"""

import argparse
import importlib.metadata
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRITON = importlib.metadata.version("triton")
# Names as pip takes them; "<6" is the newest below 6.
VERSIONS = {"transformers": ("5.17.0", "5.19.0", "<6"), "triton": ("3.6.0", TRITON)}
# Up to 3.6 Triton's interpreter reads NumPy's scalars in a way that 2.4 ended.
BESIDE = {("triton", "3.6.0"): ("numpy<2.4",)}
MODEL = ("modeling", "vision", "processing", "inference", "contract", "generation", "gradients", "configuration",
         "export", "trainer")  # fmt: skip
MODEL_TESTS = [f"tests/model/test_{name}.py" for name in MODEL]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


def install(package: str, version: str, folder: Path) -> None:
    """The version and what else must change with it, into a folder of its own."""
    requirement = f"{package}{version}" if version.startswith("<") else f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), requirement]
    command += BESIDE.get((package, version), ())
    if package == "triton":
        subprocess.run([*command, "--no-deps"], check=True)
        return
    free = (f"{package}==", "huggingface-hub==")
    pins = [pin for pin in (ROOT / "constraints.txt").read_text().splitlines() if not pin.startswith(free)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pins) + "\n")
        constraints.flush()
        subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": constraints.name})


def environment(package: str, version: str) -> dict[str, str]:
    """Variables for processes that see the version, which is installed on first use."""
    if version == importlib.metadata.version(package):
        return dict(os.environ)
    folder = ROOT / ".venv" / package / version.replace("<", "below-")
    if not folder.exists():
        install(package, version, folder)
    (found,) = importlib.metadata.distributions(name=package, path=[str(folder)])
    print(f"   {package} {found.version}", flush=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(command: list[str], variables: dict[str, str]) -> bool:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, check=False).returncode == 0


def test_kernels(variables: dict[str, str]) -> bool:
    """The interpreter's tests, a process per file, and those that compile; two processes share the work.

    Prints a line for each and the time of all.
    """
    folder = Path("tests/kernels")
    interpreted = [str(folder / path.name) for path in sorted((ROOT / folder).glob("test_triton_*.py"))]

    def test(name: str) -> tuple[str, int, str]:
        mode = {"TRITON_INTERPRET": "1"} if name in interpreted else {}
        done = subprocess.run(
            [sys.executable, *PYTEST, name], cwd=ROOT, env=variables | mode, capture_output=True, text=True, check=False
        )
        return name, done.returncode, done.stdout + done.stderr

    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    green = True
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as pool:
        # A new cache, so that compilation is part of the time.
        variables = variables | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache}
        for name, code, output in pool.map(test, [str(folder / "test_aot.py"), *interpreted]):
            print(f"  {name}: {output.strip().splitlines()[-1] if not code else output[-6000:]}", flush=True)
            green = green and not code
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"  {time.monotonic() - start:.0f} s, {work:.0f} s of processor time")
    return green


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=VERSIONS)
    parser.add_argument("versions", nargs="*", help="the usual ones if none is given")
    parser.add_argument("--configs", action="store_true", help="Triton: compile every config, into a CSV; no tests")
    given = parser.parse_args()
    failed = []
    for version in dict.fromkeys(given.versions or VERSIONS[given.package]):
        print(f"== {given.package} {version}", flush=True)
        variables = environment(given.package, version)
        if given.package == "transformers":
            green = run([*PYTEST, *MODEL_TESTS], variables)
        elif given.configs:
            green = run(["-m", "tools.compile_configs"], variables)
        else:
            green = test_kernels(variables)
        failed += [] if green else [version]
    print(f"failed on {', '.join(failed)}" if failed else "passed on all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

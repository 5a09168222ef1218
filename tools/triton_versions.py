"""Runs the Triton kernels' tests on the oldest supported Triton and on the installed one, and says what that took.

    python tools/triton_versions.py                 # interpreted values and compiled defaults: make test-triton
    python tools/triton_versions.py --configs       # compiles every config that the tuner would try: make test-aot
    python tools/triton_versions.py 3.6.0           # one version

A version other than the installed one goes, with the NumPy that its interpreter can take, into a folder under
`.venv/triton/` that precedes the environment's own packages on the path; torch and the rest are shared. Two processes
share the work.
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
FOLDER = ROOT / ".venv" / "triton"
OLDEST = "3.6.0"
INSTALLED = importlib.metadata.version("triton")
# Up to 3.6 the interpreter reads NumPy's scalars in a way that 2.4 ended.
REQUIREMENTS = {OLDEST: ("numpy<2.4",)}


def environment(version: str) -> dict[str, str]:
    """Variables for processes that see `version`, which is installed on first use."""
    if version == INSTALLED:
        return dict(os.environ)
    folder = FOLDER / version
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"triton=={version}", *REQUIREMENTS.get(version, ())], check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(command: list[str], variables: dict[str, str]) -> tuple[str, int, str]:
    """The command's last word, its exit code and its output."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    return command[-1].split("/")[-1], done.returncode, done.stdout + done.stderr


def test(version: str) -> bool:
    """The interpreter's suite, a file a process, and the compile suite; prints a line for each and the time of all."""
    with tempfile.TemporaryDirectory() as cache:  # a new one: what is timed is compiled
        return _test(environment(version) | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache})


def _test(variables: dict[str, str]) -> bool:
    folder = Path("tests/kernels")
    interpreted = sorted(str(folder / path.name) for path in (ROOT / folder).glob("test_triton_*.py"))
    pytest = ["pytest", "-q", "-p", "no:cacheprovider"]
    jobs = [([*pytest, str(folder / "test_aot.py")], variables)]
    jobs += [([*pytest, name], variables | {"TRITON_INTERPRET": "1"}) for name in interpreted]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    green = True
    with ThreadPoolExecutor(2) as pool:
        for name, code, output in pool.map(lambda job: run(*job), jobs):
            print(f"  {name}: {output.strip().splitlines()[-1] if not code else output[-6000:]}", flush=True)
            green = green and not code
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wall = time.monotonic() - start
    print(f"  {wall:.0f} s; {work:.0f} s of processor time, which two cores to themselves do in {work / 2:.0f} s")
    return green


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=[OLDEST, INSTALLED], help=f"default: {OLDEST} {INSTALLED}")
    parser.add_argument("--configs", action="store_true", help="compile every config, into a CSV; no tests")
    given = parser.parse_args()
    failed = []
    for version in dict.fromkeys(given.versions):
        print(f"== Triton {version}", flush=True)
        if given.configs:
            command = [sys.executable, "-m", "tools.compile_configs"]
            green = subprocess.run(command, cwd=ROOT, env=environment(version), check=False).returncode == 0
        else:
            green = test(version)
        if not green:
            failed.append(version)
    print(f"failed on {', '.join(failed)}" if failed else "passed on all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

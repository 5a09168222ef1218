"""Runs upstream's own common tests of the pinned transformers over FILA, and over LLaVA-NeXT in the same harness.

    python tools/upstream.py [PYTEST ARGUMENTS ...]

The tests come from the pinned version's source distribution, which is downloaded once into `build/upstream/`. A test of
FILA may be skipped, or may fail, only where LLaVA-NeXT's own does in the same run: each such test is listed with its
reason, every other one makes the exit status 1. `CHANGES` is the whole of what was written by hand; it is printed in
every run.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "upstream"
# What upstream's tests import and FILA's environment does not hold.
NEEDS = ("parameterized==0.9.0",)
COUNTERPARTS = {
    "FilaModelTest": "LlavaNextModelTest",
    "FilaWithoutFusionModelTest": "LlavaNextModelTest",
    "FilaProcessorTest": "LlavaNextProcessorTest",
}
# What the suite changes of upstream's tests, for all classes or for FILA's alone.
CHANGES = (
    "test_can_init_all_missing_weights runs on FILA in full: the suite's year stands for the configuration's, without "
    "which upstream skips models of before 2023, LLaVA-NeXT not among them",
    "the mixins of tests/generation and tests/exporters are empty, since the source distribution lacks them: "
    "tests/model/test_generation.py and tests/model/test_export.py hold these contracts",
    "test_reverse_loading_mapping and test_can_load_from_already_mapped_keys give FILA LLaVA-NeXT's older names of "
    "weights to convert from, since it has none of its own",
    "test_get_image_features_output_* compare no shape, for both models: features come per view and not per picture",
)
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


def tests_of(version: str) -> Path:
    """The folder that holds that version's tests as the package `upstream_tests`, filled on first use."""
    folder = FOLDER / version
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            pip("download", "--no-deps", "--no-binary", ":all:", "-d", scratch, f"transformers=={version}")
            (archive,) = Path(scratch).glob("transformers-*.tar.gz")
            unpacked = Path(scratch, "unpacked")
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, [m for m in tar if m.name.split("/")[1:2] == ["tests"]], filter="data")
            (tests,) = unpacked.glob("*/tests")
            (tests / "__init__.py").touch()
            FOLDER.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=FOLDER))
            shutil.move(tests, made / "upstream_tests")
            made.rename(folder)
    packages = FOLDER / "packages"
    if not packages.exists():
        pip("install", "--no-deps", "--target", str(packages), *NEEDS)
    return folder


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


def run(folder: Path, arguments: list[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Each test's outcome and reason, by class and name."""
    report = FOLDER / "report.xml"
    report.unlink(missing_ok=True)
    paths = [str(ROOT), str(FOLDER / "packages")]
    subprocess.run(
        # Without the project's own settings: upstream's marks are not ours.
        [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider",
         f"--junitxml={report}", "--tb=short", "-r", "N", str(ROOT / "tests" / "upstream" / "suite.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FILA_UPSTREAM": str(folder)},
    )  # fmt: skip
    if not report.exists():
        raise SystemExit("pytest did not run to its end")
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        key = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        outcome, reason = PASSED, ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = SKIPPED if child.tag == "skipped" else FAILED
                reason = next(iter((child.get("message") or "").strip().splitlines()), "")
        # A subtest that fails is a case of its own under its test's name.
        if found.get(key, (PASSED, ""))[0] != FAILED:
            found[key] = outcome, reason
    return found


def judge(found: dict[tuple[str, str], tuple[str, str]]) -> list[str]:
    """Prints what is not passed, and returns the tests in which FILA falls short of LLaVA-NeXT."""
    ours: list[str] = []
    shared: dict[str, list[str]] = {SKIPPED: [], FAILED: []}
    for (suite, name), (outcome, reason) in sorted(found.items()):
        if suite not in COUNTERPARTS or outcome == PASSED:
            continue
        other = found.get((COUNTERPARTS[suite], name), (PASSED, ""))[0]
        line = f"{suite}::{name}: {reason[:160]}"
        if other == outcome or (outcome, other) == (SKIPPED, FAILED):
            shared[outcome].append(line)
        else:
            ours.append(f"{outcome}, {other} by LLaVA-NeXT: {line}")
    print("\nchanged by hand:", *CHANGES, sep="\n  ")
    for outcome, lines in shared.items():
        print(f"\n{outcome} by LLaVA-NeXT too: {len(lines)}", *lines, sep="\n  ")
    print(f"\nFILA's own: {len(ours)}", *ours, sep="\n  ")
    return ours


def main(arguments: list[str]) -> int:
    version = importlib.metadata.version("transformers")
    found = run(tests_of(version), arguments)
    ours = judge(found)
    counts = {
        suite: {
            outcome: sum(s == suite and o == outcome for (s, _), (o, _) in found.items())
            for outcome in (PASSED, FAILED, SKIPPED)
        }
        for suite in sorted({suite for suite, _ in found})
    }
    print(f"\ntransformers {version}'s own tests")
    for suite, count in counts.items():
        print(f"  {suite}: " + ", ".join(f"{number} {outcome}" for outcome, number in count.items()))
    print(f"{len(ours)} failures or skips are FILA's own" if ours else "no failure and no skip is FILA's own")
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

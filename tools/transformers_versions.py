"""Runs the model's tests on other versions of transformers: the oldest supported, and the newest there is.

    python tools/transformers_versions.py [VERSION ...]      # default: 5.17.0, 5.19.0 and the newest below 6

Each version goes, with what it asks for, into a folder under `.venv/transformers/` that precedes the environment's own
packages on the path; torch and the rest are shared.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "transformers"
DEFAULT = ("5.17.0", "5.19.0", "<6")
TESTS = ("modeling", "vision", "processing", "inference")


def overlay(version: str) -> Path:
    """The folder that holds `version` ("<6" for the newest below 6), filled on first use."""
    name = version.strip("<>=")
    folder = FOLDER / (name if name == version else f"below-{name}")
    if not folder.exists():
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        kept = [pin for pin in pins if not pin.startswith(("transformers==", "huggingface-hub=="))]
        constraints = FOLDER / "constraints.txt"
        FOLDER.mkdir(exist_ok=True)
        constraints.write_text("\n".join(kept) + "\n")
        requirement = f"transformers=={version}" if name == version else f"transformers{version}"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), requirement],
            check=True,
            env={**os.environ, "PIP_CONSTRAINT": str(constraints)},
        )
    return folder


def main(versions: list[str]) -> int:
    failed = []
    for version in versions or DEFAULT:
        folder = overlay(version)
        (found,) = importlib.metadata.distributions(name="transformers", path=[str(folder)])
        print(f"== transformers {found.version}", flush=True)
        tests = [str(ROOT / "tests" / "model" / f"test_{name}.py") for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)}).returncode:
            failed.append(found.version)
    print(f"failed on {', '.join(failed)}" if failed else "passed on all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

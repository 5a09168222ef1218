"""The fuzz of checkpoint folders in small, and proof that it finds what it is made to find."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Runs the fuzz in a process of its own, which has no threads to lose when it forks."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500)


def test_mutated_folders_are_loaded_right_or_refused() -> None:
    done = run("from tests.fuzz.checkpoints import main; raise SystemExit(main(12, 0, hostile=False))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" in done.stdout


@pytest.mark.parametrize(
    "fault, words",
    [
        ("raise KeyError('planted')", "KeyError: 'planted'"),
        ("exec(compile((folder / 'evil.py').read_text(), folder / 'evil.py', 'exec'), {'__file__': folder / 'e'})",
         "code of the folder ran"),
        ("import os; os.abort()", "ended with -6"),
        ("bytearray(2**34)", "WRONG: MemoryError"),
        ("model.model.image_newline.data += 1", "loaded other numbers"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(fault: str, words: str) -> None:
    done = run(
        "from tests.fuzz import checkpoints\n"
        "right = checkpoints.load\n"
        "def load(folder=None, device='cpu'):\n"
        "    model, processor = right(device=device)\n"
        f"    if folder: {fault}\n"
        "    return model, processor\n"
        "checkpoints.load = load\n"
        "checkpoints.EDITS = [lambda draw, folder: 'nothing']\n"
        "raise SystemExit(checkpoints.main(1, 0, hostile=False))\n"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout

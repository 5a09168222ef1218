"""The command line as a process of its own: its streams, its signals, its locale and what the system denies it."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fila.cli import BAD_INPUT, CLOSED_PIPE, INTERRUPTED

QUESTION = "What is the total?"
ROOT = Path(__file__).resolve().parents[2]


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **values}


def run_fila(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fila", *arguments], capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_the_program_end_to_end(checkpoint, tmp_path):
    size = (120, 100)
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    done = run_fila(
        "ask", "a.png", QUESTION, "--json", "--model", str(checkpoint), "--backend", "reference",
        "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", "1", cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backend"]["choice"] == "reference"
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [["fila", " warning"]], "noise on stderr"
    assert found["tiles"] == [2, 2]


def start_long_run(checkpoint: Path, folder: Path) -> subprocess.Popen:
    """A run over many pictures that has answered the first."""
    Image.new("RGB", (120, 90), "white").save(folder / "a.png")
    running = subprocess.Popen(
        [sys.executable, "-m", "fila", "ask", *["a.png"] * 400, QUESTION, "--model", str(checkpoint),
         "--max-new-tokens", "1"],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline().startswith(b"a.png:")
    return running


def test_a_closed_pipe_leaves_no_traceback(checkpoint, tmp_path):
    running = start_long_run(checkpoint, tmp_path)
    running.stdout.close()
    err = running.stderr.read()
    assert running.wait(timeout=60) == CLOSED_PIPE
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_control_c_leaves_no_traceback(checkpoint, tmp_path):
    running = start_long_run(checkpoint, tmp_path)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == INTERRUPTED
    assert b"Traceback" not in err


def test_streams_of_the_program(checkpoint, tmp_path):
    """In a process of its own: closed streams, an output that is full, and names of files that take their numbers."""
    Image.new("RGB", (120, 90), "white").save(tmp_path / "a.png")
    ask = f'"{sys.executable}" -m fila ask a.png "{QUESTION}" --model "{checkpoint}" --max-new-tokens 1'
    commands = {
        f"{ask} >&- <&- --explain out.png": "standard output: expected one that can be written to, got a closed one",
        f"{ask} > /dev/full": "standard output: expected one that can be written to, got: No space left on device",
    }
    for command, message in commands.items():
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == BAD_INPUT
        assert [line for line in done.stderr.splitlines() if "warning" not in line] == [f"fila: error: {message}"]


@pytest.mark.parametrize("module", ["fila", "fila.cli"])
def test_control_c_in_the_first_seconds(module, tmp_path):
    """While torch and transformers are imported, before any code of the command runs."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name == 'transformers': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['-m', 'info']; sys.orig_argv = [sys.executable, '-m', {module!r}, 'info']\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, b"", b"")


def test_a_library_leaves_control_c_alone(tmp_path):
    code = "import signal, fila.startup; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=True)
    assert done.stdout == b"True\n"


def damaged_tiff(path: Path) -> None:
    """A TIFF about which libtiff writes lines of its own."""
    Image.fromarray(np.arange(90 * 120, dtype=np.uint8).reshape(90, 120)).save(path, compression="tiff_adobe_deflate")
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)


def test_every_mistake_is_one_line_and_the_other_pictures_are_answered(checkpoint, tmp_path):
    """In a locale of ASCII, with an input that never ends."""
    Image.new("RGB", (120, 90), "white").save(tmp_path / "zwölf.png")
    damaged_tiff(tmp_path / "damaged.tif")
    names = ["-", "damaged.tif", "zwölf.png", "-missing\n\x1b[2J.png", "x" * 300]
    with open("/dev/zero", "rb") as endless:
        done = run_fila(
            "ask", "--model", str(checkpoint), "--max-new-tokens", "1", "--", *names, "Wo steht 12 € ?",
            cwd=tmp_path, stdin=endless,
            env=environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    starts = ["standard input: ", "damaged.tif: ", "-missing\\n\\x1b[2J.png: ", "x" * 200]
    assert done.returncode == BAD_INPUT
    assert len(lines) == len(starts), done.stderr
    assert all(line.startswith(f"fila: error: {start}") for line, start in zip(lines, starts, strict=True)), lines
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["zw\\udcc3\\udcb6lf.png"]


def test_libraries_write_nothing_and_the_streams_come_back():
    code = (
        "import os; from fila.streams import without_libraries\n"
        "with without_libraries(): os.write(1, b'noise'); os.write(2, b'noise')\n"
        "os.write(1, b'answer'); os.write(2, b'error')\n"
        "before = sorted(os.listdir('/proc/self/fd'))\n"
        "with without_libraries(): pass\n"
        "assert sorted(os.listdir('/proc/self/fd')) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=True)
    assert (done.stdout, done.stderr) == (b"answer", b"error")


def test_a_disk_that_is_full(checkpoint, tmp_path):
    """The limit is on every file of the process: the explanation before stays, and so does the exit code's meaning."""
    Image.new("RGB", (120, 90), "white").save(tmp_path / "a.png")
    (tmp_path / "out.png").write_bytes(b"the last one")
    ask = ["ask", "a.png", QUESTION, "--model", str(checkpoint), "--max-new-tokens", "1", "--json"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = run_fila(*ask, "--explain", "out.png", cwd=tmp_path, env=environment(), preexec_fn=limit)
    assert done.returncode == BAD_INPUT
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert lines == [
        "fila: error: a.png: --explain: expected a file that can be written, got: [Errno 27] File too large"
    ]
    assert (tmp_path / "out.png").read_bytes() == b"the last one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "out.png"]


def test_no_memory_within_the_operation(checkpoint, tmp_path):
    """The native allocator's own words become the one line."""
    Image.new("RGB", (120, 90), "white").save(tmp_path / "a.png")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from fila import cli, fusion\n"
        "forward = fusion.DeepFusion.forward\n"
        "def limited(self, *args, **kwargs):\n"
        "    taken = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (taken, taken))\n"
        "    held = []\n"
        "    try:\n"
        "        while True: held.append(bytearray(1 << 20))\n"
        "    except MemoryError: pass\n"
        "    return forward(self, *args, **kwargs)\n"
        "fusion.DeepFusion.forward = limited\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    ask = ["ask", "a.png", QUESTION, "--model", str(checkpoint), "--max-new-tokens", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *ask], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert done.returncode == BAD_INPUT, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fila: error: expected enough memory for a.png and its answer")

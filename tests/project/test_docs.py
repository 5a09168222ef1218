"""The documents: their commands run, their links lead somewhere, the files that they name exist.

Fenced `bash` and `python` blocks run, in order, in a scratch folder that looks like the repository's root. A fence with
`no-run` (```bash no-run), for commands that need a GPU, hours or a download, is only checked for the files that it
names. `make` targets run dry, since `make test` would run these tests again.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    ROOT.glob("docs/**/*.md")
)
FOLDERS = ("fila", "fila_kernels", "csrc", "bench", "tests", "docs", "examples", "tools", "recipes")
TIME_LIMIT = 300


@dataclass
class Block:
    language: str
    runs: bool
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    blocks = []
    for match in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(match[1], "no-run" not in match[2], match[3], line))
    return blocks


def commands_of(block: str) -> list[str]:
    """The commands of a shell block: prompts, comments and continuation lines resolved."""
    lines = block.replace("\\\n", " ").splitlines()
    stripped = (line.strip().removeprefix("$ ") for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def prose_of(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    titles = re.findall(r"^#+ +(.*)$", prose_of(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose_of(text)) + re.findall(
        r'(?:src|href)="([^"]+)"', prose_of(text)
    ):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists():
            broken.append(target)
        elif anchor and path.suffix == ".md":
            other = text if path == document else path.read_text()
            if anchor not in anchors_of(other):
                broken.append(target)
    return broken


def missing_files(text: str) -> list[str]:
    """Paths in `code` or commands that begin with one of the project's folders and do not exist."""
    spans = re.findall(r"`([^`\n]+)`", prose_of(text))
    spans += [word for block in blocks_of(text) if block.language == "bash" for word in block.text.split()]
    named = {span for span in spans if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", span)}
    return sorted(name for name in named if not (ROOT / name).exists())


def missing_names(text: str) -> list[str]:
    """Names in "`file`: `name`, `name`" that the file does not hold."""
    return [
        f"{path}: {name}"
        for path, names in re.findall(r"`([\w./-]+\.\w+)`: ((?:`\w+`(?:, )?)+)", prose_of(text))
        for name in re.findall(r"`(\w+)`", names)
        if not re.search(rf"\b{name}\b", (ROOT / path).read_text())
    ]


def executable_blocks(language: str) -> list:
    return [
        pytest.param(block, id=f"{document.relative_to(ROOT)}:{block.line}")
        for document in DOCUMENTS
        for block in blocks_of(document.read_text())
        if block.language == language and block.runs
    ]


@pytest.fixture(scope="module")
def scratch_root(tmp_path_factory) -> Path:
    """A folder with links to the repository's entries: relative paths work, and new files stay out of the checkout."""
    folder = tmp_path_factory.mktemp("docs")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "out", "runs", "build"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document):
    text = document.read_text()
    assert not broken_links(document, text)
    assert not missing_files(text)
    assert not missing_names(text)


def test_every_document_is_reachable_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    links = {(ROOT / "docs" / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^()\s]+)\)", index)}
    lost = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")) if path.resolve() not in links]
    assert lost in ([], ["docs/index.md"])


def check_make(command: str) -> None:
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    known = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(targets) <= set(known), f"`{command}`: the Makefile knows {', '.join(known)}"
    if shutil.which("make") is not None:
        subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("block", executable_blocks("bash"))
def test_commands_run(block, scratch_root):
    binaries = str(Path(sys.executable).parent)
    variables = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for command in commands_of(block.text):
        program = command.split()[0]
        if program == "make":
            check_make(command)
            continue
        if program == "source":  # the tests are in that environment already
            assert command == "source .venv/bin/activate"
            continue
        assert re.match(r"(fila|python -m|python examples/|cat|echo|ls|curl file:)\b", command), (
            f"`{command}`: not a command these tests can run; say no-run on its fence"
        )
        done = subprocess.run(
            ["bash", "-c", command], cwd=scratch_root, env=variables, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"`{command}` exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("block", executable_blocks("python"))
def test_python_blocks_run(block, scratch_root):
    done = subprocess.run(
        [sys.executable, "-"], input=block.text, cwd=scratch_root, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_these_checks_can_fail():
    document = ROOT / "README.md"
    text = (
        "# A title\n[a](#a-title) [b](#elsewhere) [c](docs/none.md) [d](LICENSE) `fila/none.py` `tests/conftest.py`\n"
    )
    assert broken_links(document, text) == ["#elsewhere", "docs/none.md"]
    assert missing_files(text) == ["fila/none.py"]
    assert missing_names("`fila/cli.py`: `main`, `absent_name`; `setup.py`: `absent_name`") == [
        "fila/cli.py: absent_name",
        "setup.py: absent_name",
    ]
    fenced = "```bash\n$ make demo  \n# why\nfila ask \\\n  a.png\n```\n```bash no-run\nmake gpu\n```\n"
    first, second = blocks_of(fenced)
    assert commands_of(first.text) == ["make demo", "fila ask    a.png"]
    assert (first.runs, second.runs) == (True, False)
    with pytest.raises(AssertionError, match="make nothing"):
        check_make("make nothing")

"""Finds a checkpoint and resolves its one list of files; nothing outside that list is read.

The list holds data only: JSON, a chat template, and tensors in safetensors files. Each file lies in the folder itself,
no name in a file leads to another, and a folder with two layouts of weights is refused, since neither is meant more.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from fila.checkpoints.quiet import quiet
from fila.errors import is_out_of_memory, one_line

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained" / "fila-nano"
HUB_PREFIX = "hf:"
REQUIRED_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Read by the tokenizer where they are there.
OPTIONAL_FILES = (GENERATION, CHAT_TEMPLATE, "special_tokens_map.json", "added_tokens.json")
# Other chat templates, and weights in layouts that are not read: beside the files above, either could be meant.
FOREIGN_FILES = re.compile(
    r"chat_template\.json|additional_chat_templates|adapter_(config|model)\..*|.*\.gguf|tf_model.*\.h5"
    r"|flax_model.*\.msgpack|pytorch_model(-\d.*)?\.bin(\.index\.json)?|model.*\.safetensors(\.index\.json)?"
)
MOST_BYTES = {"tokenizer.json": 2**28}  # of a file that is read as a whole
MOST_BYTES_OTHERS = 2**24
MOST_NAMED = 200  # faults in one message


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        name: the checkpoint in messages.
        folder: where all its files lie.
        weights: files with tensors.
        index: for weights in several files, the file of every tensor; None for a single file.
    """

    name: str
    folder: Path
    weights: list[Path] = field(default_factory=list)
    index: dict[str, str] | None = None

    def error(self, *faults: str) -> CheckpointError:
        """The error that names all faults, up to a number that fits a screen."""
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        return CheckpointError(f"checkpoint {shown(self.name)}: {'; '.join(faults[:MOST_NAMED])}{more}")

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def read_text(self, file: str) -> str:
        """The text of a file that is no larger than such a file can be."""
        path, most = self.folder / file, MOST_BYTES.get(file, MOST_BYTES_OTHERS)
        try:
            if (size := path.stat().st_size) > most:
                raise self.error(f"{file}: expected at most {most} bytes, got {size}")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"{file} cannot be read: {one_line(error)}") from error

    def read_object(self, file: str) -> dict[str, Any]:
        """The JSON object of a file; its numbers are finite."""
        text = self.read_text(file)
        try:
            found = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{file} cannot be read: {one_line(error)}") from error
        if not isinstance(found, dict):
            raise self.error(f"{file}: expected an object, got {type(found).__name__}")
        return found


def shown(text: object) -> str:
    """A name out of a file as part of a message: no control characters, no more than 200 characters."""
    found = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:201])
    return found if len(found) <= 200 else f"{found[:200]}..."


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {text[:40]}")
    return number


def locate(path: str | Path | None) -> Checkpoint:
    """Finds a checkpoint and the files that make it up.

    Args:
        path: a folder, `hf:owner/name`, or None for the shipped checkpoint. Only a name with `hf:` in front reaches a
            network; it never names a local folder.

    Raises:
        CheckpointError: no such checkpoint, or its files are missing, too many, or lie elsewhere.
    """
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        return resolve_files(path, fetch(path))
    folder = SHIPPED if path is None else Path(path)
    if not folder.is_dir():
        if path is None:
            raise CheckpointError(
                f"expected the shipped checkpoint at {folder}, got nothing there; name another folder"
            )
        got = "a file" if folder.exists() else "nothing there"
        hint = (
            f"; {HUB_PREFIX}{path} would fetch it from the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        )
        raise CheckpointError(f"checkpoint {shown(path)}: expected a folder, got {got}{hint}")
    return resolve_files(str(folder), folder)


def fetch(path: str) -> Path:
    """The local copy of `hf:owner/name`, with the files that a checkpoint can have and no others."""
    wanted = [*REQUIRED_FILES, *OPTIONAL_FILES, WEIGHTS_INDEX, "model*.safetensors"]
    name = path.removeprefix(HUB_PREFIX)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(f"checkpoint {shown(path)}: expected {HUB_PREFIX}owner/name")
    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # of the network, the hub and its cache
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"checkpoint {path}: it cannot be fetched: {one_line(error)}") from error


def resolve_files(name: str, folder: Path) -> Checkpoint:
    """The one list of files of a folder.

    Raises:
        CheckpointError: a file is missing, lies outside the folder, or is of a second layout of weights or templates.
    """
    found = Checkpoint(name, folder)
    for file in REQUIRED_FILES:
        resolve(found, file)
    if (folder / WEIGHTS_INDEX).is_file():
        index = read_index(found, WEIGHTS_INDEX, ".safetensors")
        files = sorted(set(index.values()))
    elif (folder / WEIGHTS).exists():
        index, files = None, [WEIGHTS]
    else:
        raise found.error(f"expected a file {WEIGHTS} or {WEIGHTS_INDEX}, got neither")
    known = {*files, *([WEIGHTS_INDEX] if index is not None else [])}
    foreign = sorted(e.name for e in folder.iterdir() if FOREIGN_FILES.fullmatch(e.name) and e.name not in known)
    if foreign:
        raise found.error(
            f"expected one layout of weights and one chat template, {', '.join(sorted(known))} and {CHAT_TEMPLATE}, "
            f"got {shown(', '.join(foreign))} beside"
        )
    for file in known | {file for file in OPTIONAL_FILES if (folder / file).exists() or (folder / file).is_symlink()}:
        resolve(found, file)
    return Checkpoint(name, folder, [folder / file for file in files], index)


def read_index(checkpoint: Checkpoint, name: str, ending: str) -> dict[str, str]:
    """The file of every tensor, out of an index; the files lie in the folder and have that ending."""
    index = checkpoint.read_object(name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise checkpoint.error(f"{name} cannot be read: expected a weight_map of tensors and files")
    for file in index.values():
        if not isinstance(file, str):
            raise checkpoint.error(f"{name}: expected names of files, got {shown(repr(file))}")
        if not re.fullmatch(r"\w[\w.-]*" + re.escape(ending), file):
            raise checkpoint.error(
                f"{name}: expected names of {ending[1:]} files in the folder, got {shown(repr(file))}"
            )
    return index


def resolve(checkpoint: Checkpoint, file: str) -> None:
    """Refuses a file that is missing or lies elsewhere."""
    folder = checkpoint.folder.resolve()
    # A folder of the hub's cache holds links to the blobs beside it.
    rooms = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        target = (checkpoint.folder / file).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise checkpoint.error(f"expected a file {file}, got: {one_line(error)}") from error
    if not any(target.is_relative_to(room) for room in rooms):
        raise checkpoint.error(f"expected a file {file} in the folder, got a link that leads out of it")
    if not target.is_file():
        raise checkpoint.error(f"expected a file {file}, got {'no plain file' if target.exists() else 'none'}")

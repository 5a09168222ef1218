"""Writes the files of a large checkpoint into a folder that gets its name at the end; goes on where a kill ended it.

A file is streamed tensor by tensor, so that memory holds one tensor and not one file. Until the end everything lies in
a folder beside the final one, each finished file in its manifest with its SHA-256; what is there and unchanged is not
written again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fila.checkpoints.check import CheckpointError
from fila.checkpoints.plan import Piece
from fila.errors import one_line

MANIFEST = "assembly.json"


def partial_folder(out: Path) -> Path:
    """Where a checkpoint lies until it is complete."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def unfinished(out: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder that becomes `out` when the block ends well, and its manifest with the files that are finished.

    Files of another plan are thrown away. After an error the folder stays for the next try.

    Raises:
        CheckpointError: `out` exists, or another process writes it. An OSError in the block becomes one, too.
    """
    folder = partial_folder(out)
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: expected a name that is free, got one that exists")
    lock = None
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{out}: expected nobody else to write it, got another process that does") from error
        yield folder, _resume(folder, dict(manifest))
        os.fsync(lock)
        os.rename(folder, out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: expected files that can be written, got: {one_line(error)}; the same command goes on from {folder}"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)


def _resume(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files = found.pop("files")
        same = found == json.loads(json.dumps(manifest)) and isinstance(files, dict)
    except (OSError, ValueError, KeyError, AttributeError):
        same = False
    if not same:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        files = {}
    manifest["files"] = files
    return manifest


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(folder: Path, manifest: dict[str, Any], name: str, write: Callable[[Any], Any]) -> None:
    """Writes a file whole or not at all, then enters it in the manifest."""
    _replace(folder / name, write)
    manifest["files"][name] = digest(folder / name)
    _save_manifest(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Enters every other file of the folder in the manifest, and sees that they are on the disk."""
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.name not in manifest["files"]:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            manifest["files"][path.name] = digest(path)
    _save_manifest(folder, manifest)


def _save_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    _replace(folder / MANIFEST, lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    beside = path.with_name(path.name + ".writing")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def is_finished(folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
    return name in manifest["files"] and (folder / name).is_file() and digest(folder / name) == manifest["files"][name]


def write_safetensors(
    file: Any, pieces: Iterable[Piece], read: Callable[[Piece], Iterable[Tensor]], progress: Callable[[int], Any]
) -> None:
    """Writes tensors in the safetensors format as they are read.

    Args:
        file: open for writing bytes.
        pieces: of one dtype, which keeps every tensor aligned.
        read: the numbers of a piece, row after row.
        progress: told the number of bytes written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces, end = tuple(pieces), 0
    for piece in pieces:
        header[piece.target] = {
            "dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end := end + piece.num_bytes]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for piece in pieces:
        written = 0
        for tensor in read(piece):
            written += file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert written == piece.num_bytes, f"{piece.target}: {written} bytes of {piece.num_bytes}"
        progress(written)

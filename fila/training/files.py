"""Keeps the files of a run: its lock, checkpoints that are whole or not there, and the record of every step.

    checkpoint-N/   model, processor, optimizer, scheduler, random states, `data.json`, and `manifest.json`: the size
                    and digest of every other file
    unfinished/     a checkpoint that is being written; nothing reads it
    log.jsonl       one line per step
    broken.txt      records that were left out, and why
    recipe.json     the recipe as it ran, versions, commit and fingerprints of the data
    lock            empty; locked by the kernel while a process trains here

A checkpoint is written under another name, flushed to the disk, and renamed.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fila.training.errors import TrainingError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
PREFIX = "checkpoint-"

_held: set[int] = set()


def _release_in_child() -> None:
    """A process that reads data would otherwise hold the lock of a run that was killed before it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the kernel frees it when the process ends, however it ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{folder}: another run is using this folder") from None
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contents(folder: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = (path.stat().st_size, digest)
    return found


def finish(unfinished: Path, target: Path) -> None:
    """Makes a written folder a checkpoint: flushed, listed, renamed."""
    contents = _contents(unfinished)
    for name in contents:
        sync(unfinished / name)
    write_json(unfinished / MANIFEST, contents)
    sync(unfinished)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    sync(target.parent)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, oldest first."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(named, key=step_of)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is there to its last byte."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    found = _contents(checkpoint)
    for name, (size, digest) in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != (size, digest):
            return f"{name} is damaged"
    return None


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what is wrong with those behind it, which are renamed to `*.torn`."""
    torn: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, torn
        torn.append(f"{checkpoint}: {fault}; the checkpoint before it is used")
        aside = checkpoint.with_name(checkpoint.name + ".torn")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return None, torn


def drop_old(folder: Path, keep: int) -> None:
    for checkpoint in checkpoints(folder)[:-keep]:
        shutil.rmtree(checkpoint)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line that a kill cut short is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def drop_rows(path: Path, step: int) -> None:
    """Leaves the rows of a log up to a step: those behind it will be run again."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))
    sync(temporary)
    temporary.replace(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: set[str], place: str = "") -> list[str]:
    """Entries that differ in nested mappings, but those that `free` names."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, one, other = f"{place}{key}", old.get(key), new.get(key)
        if name in free or one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, free, f"{name}.")
        else:
            found.append(f"{name} was {one!r} and is now {other!r}")
    return found

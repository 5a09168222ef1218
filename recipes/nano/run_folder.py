"""Keeps the files of a run: each stage's lock, checkpoint with its settings, and log.

    <stage>.pt            learned and averaged weights, optimisers, step and settings, as of the last save
    <stage>.previous.pt   the save before it; nothing reads it until it is renamed by hand
    <stage>.csv           the log; after a resume it continues behind the row of the checkpoint's step
    <stage>.lock          empty; locked by the kernel while a process trains the stage

A checkpoint and a shortened log are written beside the old file, flushed to the disk and renamed, so that a kill at any
moment leaves a whole file. What does not fit is refused before the first step, with a `RunError`.
"""

import csv
import fcntl
import hashlib
import io
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

KEYS = {"learning", "average", "optimizers", "step"}
NAMED = 3  # faults that a message names; it counts the others

_held: set[int] = set()


class RunError(ValueError):
    """A run that must not start or go on; `main` prints it as one line."""


def _release_in_child() -> None:
    """A process that draws pages would otherwise hold the lock of a run that was killed before it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def locked(folder: Path, stage: str, before: Sequence[str] = ()) -> Iterator[None]:
    """Holds a stage for this process alone, and keeps the stages before it from changing meanwhile.

    The kernel frees the locks when the process ends, however it ends.
    """
    taken = []
    try:
        for name in (stage, *before):
            descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            taken.append(descriptor)
            _held.add(descriptor)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if name == stage else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{folder}: another run is using stage {name!r} of this folder") from None
        yield
    finally:
        for descriptor in taken:
            if descriptor in _held:
                _held.remove(descriptor)
                os.close(descriptor)


def identity(path: Path) -> str:
    """A file's name (or its folder's) and digest: weights that differ have another identity."""
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def read(path: Path) -> dict[str, Any]:
    """A whole and finite checkpoint; what it holds is compared by `check_weights` and `restore`."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: expected a plain file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch reads without looking at the checksums
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # torch and zipfile have many words for it
        raise RunError(f"{path}: cannot be read, damaged or not a checkpoint ({type(error).__name__})") from error
    if damaged:
        raise RunError(f"{path}: damaged, the checksum of {damaged} is wrong")
    if not isinstance(state, dict) or not set(state) >= KEYS:
        raise RunError(f"{path}: not a checkpoint of this recipe")
    if name := not_finite(state):
        raise RunError(f"{path}: {name} is not finite")
    return state


def check_weights(weights: Any, like: Mapping[str, Tensor], source: Path) -> None:
    """Refuses weights that are not those of `like` name for name, shape for shape and type for type, or not finite."""
    if not isinstance(weights, Mapping):
        raise RunError(f"{source}: expected weights by name, got {type(weights).__name__}")
    faults = [f"{name} is missing" for name in like if name not in weights]
    faults += [f"{name} is unknown" for name in weights if name not in like]
    for name in like.keys() & weights.keys():
        if _kind(weights[name]) != _kind(like[name]):
            faults.append(f"{name} is {_kind(weights[name])} instead of {_kind(like[name])}")
        elif not weights[name].isfinite().all():
            faults.append(f"{name} is not finite")
    if faults:
        more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise RunError(f"{source}: other weights than this model's: {', '.join(sorted(faults)[:NAMED])}{more}")


def _kind(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def not_finite(value: Any, name: str = "") -> str | None:
    """The name of the first tensor or number in nested dictionaries and lists that is NaN or infinite."""
    if isinstance(value, Tensor):
        return None if value.isfinite().all() else name
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for key, v in items if (found := not_finite(v, f"{name}.{key}".lstrip(".")))), None)


def restore(
    path: Path,
    settings: dict[str, Any],
    learning: Mapping[str, Tensor],
    average: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Puts a checkpoint's state into the given objects and returns its step; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    try:
        saved = read(path)
    except RunError as error:
        spare = _previous(path)
        if not spare.exists():
            raise
        raise RunError(f"{error}; the save before it, {spare.name}, takes its place when renamed by hand") from error
    _check_settings(saved.get("settings"), settings, path)
    check_weights(saved["learning"], learning, path)
    check_weights(saved["average"], average, path)
    step = saved["step"]
    if not isinstance(step, int) or not 0 < step <= settings["steps"]:
        raise RunError(f"{path}: expected a step from 1 to {settings['steps']}, got {step!r}")
    if len(saved["optimizers"]) != len(optimizers) or not all(map(_fits, saved["optimizers"], optimizers)):
        raise RunError(f"{path}: the state of other optimisers than this stage's")
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(saved["learning"][name])
    average.update(saved["average"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return step


def _check_settings(stored: Any, given: dict[str, Any], path: Path) -> None:
    """A run that goes on under other settings would be neither of the two."""
    if not isinstance(stored, dict):
        raise RunError(f"{path}: holds no settings to compare, so it cannot be gone on from")
    differing = [
        f"{name} was {stored.get(name)!r} and is now {given.get(name)!r}"
        for name in sorted(stored.keys() | given.keys())
        if stored.get(name) != given.get(name)
    ]
    if differing:
        raise RunError(f"{path}: settings differ: {', '.join(differing)}; give the same ones, or use another folder")


def _fits(saved: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state has the optimiser's groups, and for each parameter values of its shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    try:
        return (
            [(group["params"], group.keys()) for group in saved["param_groups"]]
            == [(group["params"], group.keys()) for group in groups]
            and set(saved["state"]) <= set(range(len(parameters)))
            and all(
                value.ndim == 0 or value.shape == parameters[index].shape
                for index, values in saved["state"].items()
                for value in values.values()
            )
        )
    except (AttributeError, KeyError, TypeError):
        return False


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint by a finite state; the one before is kept as `<stage>.previous.pt`."""
    if name := not_finite(state):
        raise RunError(f"step {state['step']}: {name} is not finite; {path.name} stays as it was")
    _write(path, lambda file: torch.save(state, file), spare=_previous(path))


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous.pt")


def _write(path: Path, write: Callable[[BinaryIO], Any], spare: Path | None = None) -> None:
    """Writes a file beside `path`, flushes it to the disk and renames it; the old one gets the name `spare`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's own, while it handles that the disk is full
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise RunError(f"{path}: cannot be written: {getattr(cause, 'strerror', None) or cause}") from error
    if spare and path.exists():
        spare.unlink(missing_ok=True)
        os.link(path, spare)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Log:
    """The run's record: a CSV row and a printed line every `every` steps.

    Rows of steps behind `step` are dropped first: they will be run again.
    """

    every = 25

    def __init__(self, path: Path, settings: dict[str, Any], step: int):
        self.path = path
        self.sums: dict[str, float] = {}
        self.count, self.since = 0, time.monotonic()
        drop_rows(path, step)
        print(settings, flush=True)

    def add(
        self, step: int, steps: int, losses: Mapping[str, Tensor], norm: Tensor, rate: float, gates: Sequence[nn.Module]
    ) -> None:
        for part, loss in losses.items():
            self.sums[part] = self.sums.get(part, 0.0) + float(loss.detach())
        self.count += 1
        if step % self.every and step != steps:
            return
        seconds = (time.monotonic() - self.since) / self.count
        row: dict[str, float | str] = {"step": step}
        row |= {part: round(total / self.count, 4) for part, total in self.sums.items()}
        row |= {"norm": round(float(norm), 3), "lr": f"{rate:.2e}", "s": round(seconds, 3)}
        for i, fusion in enumerate(gates):
            row[f"alpha{i}"] = round(fusion.alpha.item(), 4)  # type: ignore[operator,union-attr]
        self._write(row)
        left = (steps - step) * seconds / 60
        print(" ".join(f"{k} {v}" for k, v in row.items()), f"left {left:.0f} min", flush=True)
        self.sums, self.count, self.since = {}, 0, time.monotonic()

    def _write(self, row: dict[str, float | str]) -> None:
        """Appends a row. A loss that no row had before gets a column: not every page has every kind of guide."""
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            reader = csv.DictReader(file)
            columns, earlier = list(reader.fieldnames or ()), list(reader)
            if columns and row.keys() <= set(columns):
                csv.DictWriter(file, columns).writerow(row)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint never gets to the disk before its row
                return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns + [name for name in row if name not in columns])
        writer.writeheader()
        writer.writerows([*earlier, row])
        _write(self.path, lambda file: file.write(text.getvalue().encode()))


def drop_rows(path: Path, step: int) -> None:
    """Leaves the rows of a log up to a step, and no torn one; the file is whole at any moment."""
    if not path.exists():
        return
    header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
    if header and not header.startswith(b"step,"):
        raise RunError(f"{path}: not a log of this recipe; move it away")
    firsts = [row.split(b",")[0] if row.endswith(b"\n") else b"" for row in rows]
    kept = [row for row, first in zip(rows, firsts, strict=True) if first.isdigit() and int(first) <= step]
    if len(kept) < len(rows) or not kept:
        print(f"{path.name}: {len(rows) - len(kept)} rows behind step {step} are dropped", flush=True)
        _write(path, lambda file: file.writelines([header, *kept] if kept else []))

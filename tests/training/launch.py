"""Trains in forked processes: none pays for imports, and a test may kill one at any point."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fila.training import files
from fila.training.recipe import Recipe, check, make

LIMIT = 240  # seconds


def log_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows that a run has logged."""
    return files.read_log(Path(recipe.run.folder) / "log.jsonl")


def recipe_of(folder: Path, corpus: Path, checkpoint: Path, **changes: Any) -> Recipe:
    """A short run over a small corpus; `changes` by section and key, as `data_rows=4`."""
    fields: dict[str, dict[str, Any]] = {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"sources": [{"path": str(corpus)}], "length": 300, "rows": 2, "workers": 0},
        "optimizer": {"rate": 1e-3, "warmup": 0.0, "schedule": "constant_with_warmup"},
        "run": {"folder": str(folder), "steps": 4, "save_every": 2, "log_every": 100, "device": "cpu"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("_")
        fields[section][key] = value
    recipe = make(Recipe, fields, "test")
    check(recipe)
    return recipe


def kill_at(step: int, saving: bool = False) -> Callable[[], None]:
    """Makes a process kill itself behind a step, or in the middle of that step's checkpoint."""

    def plant() -> None:
        from fila.training import files
        from fila.training.trainer import FilaTrainer

        if saving:
            write = files.write_json

            def half(path: Path, value: Any) -> None:
                if path.name == files.MANIFEST and path.parent.name == f"{files.PREFIX}{step}":
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, value)

            files.write_json = half
        else:
            end = FilaTrainer.end_step

            def last(self: Any, state: Any, control: Any) -> None:
                end(self, state, control)
                if state.global_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            FilaTrainer.end_step = last  # type: ignore[method-assign]

    return plant


def launch(
    recipe: Recipe, world: int = 1, plant: Callable[[], None] | None = None, accept_changes: bool = False
) -> tuple[list[int | None], str]:
    """Exit codes of the processes (negative for a signal), and what they wrote."""
    out = Path(recipe.run.folder).with_suffix(".out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_child, args=(recipe, rank, world, port, out, plant, accept_changes))
        for rank in range(world)
    ]
    out.write_text("")
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes], out.read_text()


def _child(
    recipe: Recipe, rank: int, world: int, port: int, out: Path, plant: Callable[[], None] | None, accept: bool
) -> None:
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    if world > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from fila.training import run

    if plant:
        plant()
    try:
        code = run.train(recipe, accept)
    except ValueError as error:
        traceback.print_exc()
        print(f"error: {error}", flush=True)
        code = 2
    sys.stdout.flush()
    os._exit(code)

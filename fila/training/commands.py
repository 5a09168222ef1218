"""Defines the commands `fila data check` and `fila train` for the command line, and runs them.

Nothing heavy is imported before a command runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_parsers(commands: Any, positive: Callable[[str], int]) -> dict[str, argparse.ArgumentParser]:
    """Adds the commands to those of `fila`, and returns their parsers by name."""
    data = commands.add_parser(
        "data", help="check a corpus for training", description="Read a corpus once and report what a run would find."
    )
    data.add_argument("action", choices=["check"], help="what to do")
    data.add_argument("path", type=Path, help=".json, .jsonl, .parquet or .tar, or a folder of the last two")
    data.add_argument("--images", type=Path, help="folder that names of pictures start from (default: the file's)")
    data.add_argument("--model", metavar="PATH", help="checkpoint whose tokenizer and canvases count (default: nano's)")
    data.add_argument("--length", type=positive, default=8192, help="tokens of a row (default: 8192)")
    data.add_argument("--workers", type=int, default=0, help="processes that read (default: 0, this one)")
    data.add_argument("--picture", type=Path, metavar="OUT.png", help="draw sample pictures with their tiles")
    data.add_argument("--json", action="store_true", help="print JSON")

    train = commands.add_parser(
        "train", help="train a model by a recipe", description="Train by a recipe; started again, go on.",
        epilog="Of several processes: torchrun --nproc-per-node 8 -m fila train RECIPE.yaml",
    )  # fmt: skip
    train.add_argument("recipe", type=Path, help="YAML file, see fila/training/recipe.py")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="entries in place of the recipe's")
    train.add_argument(
        "--accept-changes", action="store_true", help="go on though settings or data are not the checkpoint's"
    )
    return {"data": data, "train": train}


def train(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Runs `fila train`."""
    from fila.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    from fila.training import run  # after the recipe was found good: these imports take seconds

    return run.train(recipe, options.accept_changes, write)


def check_data(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Runs `fila data check`; the exit code is 2 where a record is broken."""
    from fila.checkpoints.check import locate
    from fila.checkpoints.config import read_config
    from fila.checkpoints.processor import read_processor
    from fila.checkpoints.weights import open_tensors
    from fila.training.data.check import check_corpus, draw_samples, format_report

    checkpoint = locate(options.model)
    with open_tensors(checkpoint) as tensors:
        processor = read_processor(checkpoint, read_config(checkpoint, len(tensors)))
    report, samples = check_corpus(options.path, processor, options.length, options.images, options.workers)
    write(json.dumps(report.to_dict(), indent=2) if options.json else format_report(report))
    if options.picture:
        draw_samples(samples, processor.image_processor.geometry).save(options.picture)
    return 2 if report.faults else 0

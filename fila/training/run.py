"""Runs a recipe: checks it, takes the folder, builds model and data, goes on from the last whole checkpoint, trains."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.utils import logging

from fila.errors import is_out_of_memory, one_line
from fila.training import files
from fila.training.build import build_corpus, build_model, open_sources, pad_id_of
from fila.training.data.loader import Rows
from fila.training.data.sources import fingerprint
from fila.training.errors import TrainingError
from fila.training.recipe import Recipe, passes
from fila.training.trainer import FilaTrainer

PACKAGES = ("fila", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pillow")
# What a run may change when it goes on.
FREE = {
    "run.folder", "run.save_every", "run.keep", "run.log_every", "run.peak_tflops", "data.workers", "run.parallel",
    "run.reshard",
}  # fmt: skip
TERMINATED = 143  # 128 + SIGTERM, as shells say it
LAYERS = ("LlamaDecoderLayer", "CLIPEncoderLayer", "CheckpointedConvNextLayer", "DeepFusion")


def train(recipe: Recipe, accept_changes: bool = False, say: Callable[[str], None] = print) -> int:
    """Trains to the recipe's last step and returns the exit code: 0, or 143 where SIGTERM ended it with a checkpoint.

    Args:
        accept_changes: whether to go on though settings or data are others than the checkpoint's.

    Raises:
        TrainingError: the run must not start or go on. `ValueError` of the checkpoint's loader passes through.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingError('expected accelerate to be installed: pip install "fila[train]"')
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    per_process = passes(recipe, world)
    folder = Path(recipe.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder) if rank == 0 else nullcontext():
        sources = open_sources(recipe)
        model, processor = build_model(recipe)
        corpus = build_corpus(recipe, sources, processor)
        facts = {"recipe": recipe.to_dict(), "data": [fingerprint(source) for source in sources]}
        logging.set_verbosity_error()
        arguments = make_arguments(recipe, per_process)
        start, cursors = _find_start(folder, facts, accept_changes, rank, say)
        if rank == 0:
            files.write_json(folder / "recipe.json", facts | {"started": provenance(), "processes": world})
        lanes = list(range(rank, per_process * world, world))
        rows = Rows(
            corpus, processor.image_processor, pad_id_of(processor), lanes, per_process * world,
            0 if recipe.data.packing else recipe.data.micro_batch, {n: c for n, c in cursors.items() if n in lanes},
        )  # fmt: skip
        trainer = FilaTrainer(model, arguments, recipe, rows, processor, facts)
        trainer.stop_at_sigterm()
        try:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(out_of_memory(recipe, error)) from error
        finally:
            if dist.is_initialized() and sys.exc_info()[0] is None:
                dist.destroy_process_group()
    return TERMINATED if trainer.terminated or trainer.state.global_step < recipe.run.steps else 0


def make_arguments(recipe: Recipe, per_process: int) -> TrainingArguments:
    """The Trainer's settings; data, optimizer groups, log and checkpoints are `FilaTrainer`'s."""
    run, optimizer = recipe.run, recipe.optimizer
    cpu = run.device == "cpu" or not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sharded = {}
    if run.parallel == "fsdp" and several:
        sharded = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "reshard_after_forward": run.reshard,
                "transformer_layer_cls_to_wrap": list(LAYERS),
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    return TrainingArguments(
        run.folder,
        max_steps=run.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=per_process,
        learning_rate=optimizer.rate,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=round(optimizer.warmup * run.steps),
        max_grad_norm=optimizer.clip,
        seed=run.seed,
        bf16=run.precision == "bfloat16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and several else None,
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=run.save_every,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **sharded,
    )


def _find_start(
    folder: Path, facts: dict[str, Any], accept_changes: bool, rank: int, say: Callable[[str], None]
) -> tuple[Path | None, dict[int, dict[str, Any]]]:
    """The checkpoint to go on from, and its lanes' states."""
    if dist.is_initialized() and rank:
        dist.barrier()  # the first process moves torn checkpoints away
    checkpoint, torn = files.last_whole(folder)
    for line in torn:
        say(line)
    if dist.is_initialized() and not rank:
        dist.barrier()
    if rank == 0:
        files.drop_rows(folder / "log.jsonl", files.step_of(checkpoint) if checkpoint else 0)
    if checkpoint is None:
        return None, {}
    saved = json.loads((checkpoint / "data.json").read_text())
    changed = files.differences(saved["facts"], json.loads(json.dumps(facts)), {f"recipe.{name}" for name in FREE})
    if changed and not accept_changes:
        raise TrainingError(
            f"{checkpoint}: {', '.join(changed)}; give the same, another run.folder, or --accept-changes"
        )
    if rank == 0:
        say(f"going on from {checkpoint}")
    return checkpoint, {int(lane): cursor for lane, cursor in saved["cursors"].items()}


def out_of_memory(recipe: Recipe, error: BaseException) -> str:
    """What to lower: activations are in proportion to the tokens of a forward pass."""
    data, model = recipe.data, recipe.model
    advice = [] if model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
    advice += [] if model.recompute else ["model.recompute=true"]
    if data.micro_batch > 1:
        advice.append(f"data.micro_batch={data.micro_batch // 2}, which halves the activations")
    else:
        advice.append(f"data.length={data.length // 2}, which halves the activations (data.rows={data.rows * 2} keeps")
        advice[-1] += " the tokens of a step)"
    return f"out of memory in a pass over up to {data.length} tokens: {', or '.join(advice)} ({one_line(error):.200})"


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, as they were when the run started."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    place = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=place, capture_output=True, text=True
        )
        commit = found.stdout.strip() or None
    except OSError:
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"versions": versions, "commit": commit, "python": platform.python_version(), "device": device}

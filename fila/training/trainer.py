"""Trains with Hugging Face Trainer: rows from lanes, frozen towers at rest, every step recorded, whole checkpoints."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fila.fusion import Fusion
from fila.training import files
from fila.training.build import modules_at_rest, rest
from fila.training.data.loader import MicroBatch, Rows, make_loader
from fila.training.errors import TrainingError
from fila.training.flops import PEAK_TFLOPS, forward_flops, step_flops
from fila.training.recipe import PARTS, Recipe

NAMED = 8  # records that a message names
# What a step's processes add up.
SUMS = ("loss", "tokens", "room", "learned", "images", "views", "flops", "broken", "stop")


class FilaTrainer(Trainer):
    """Trainer with the rows of `fila.training.data` and the files of `fila.training.files`.

    Args:
        facts: what a checkpoint must agree with to be gone on from, see `fila.training.run`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        recipe: Recipe,
        rows: Rows,
        processor: Any,
        facts: dict,
    ):
        self.recipe, self.rows, self.facts = recipe, rows, facts
        self.folder = Path(recipe.run.folder)
        self.cursors = dict(rows.cursors)
        self.at_rest = modules_at_rest(model)
        self.gates = [m for m in model.modules() if isinstance(m, Fusion) and m.opening() is not None]
        self.config, self.geometry = model.config, processor.image_processor.geometry
        self.batches: list[MicroBatch] = []
        self.losses: list[Tensor] = []
        self.norm = math.nan
        self.progress: dict[str, float] = {}
        self.seen_broken: set[str] = set()
        self.terminated = self._saving = False
        self._before = self._began = time.monotonic()
        super().__init__(model, arguments, train_dataset=rows, processing_class=processor)
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepEnd(self))

    # Data

    def get_train_dataloader(self) -> Any:
        """The rows as they are: accelerate would deal them out a second time."""
        self.rows.cursors = dict(self.cursors)
        return make_loader(self.rows, self.recipe.data.workers)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self.batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.losses = []
        inputs = [batch.inputs for batch in self.batches]
        # A step may hold nothing to learn, where all of its records were broken.
        return inputs, self._get_num_items_in_batch(inputs, device).clamp(min=1)

    # Steps

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        rest(self.at_rest)  # the Trainer has just put everything into training mode
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # A step of text alone: as in several processes, where the encoder's gradients are then zero.
                parameter.grad = torch.zeros_like(parameter)
        norm = super()._clip_grad_norm(model)
        value = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.norm = float(value)
        losses = torch.stack(self.losses)
        if not (math.isfinite(self.norm) and losses.isfinite().all()):
            bad = [b for b, loss in zip(self.batches, losses.tolist(), strict=True) if not math.isfinite(loss)]
            names = [name for batch in bad or self.batches for name in batch.names]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise TrainingError(
                f"step {self.state.global_step + 1}: loss or gradient is not finite (loss {float(losses.sum()):.4g}, "
                f"gradient norm {self.norm:.4g}); its records: {', '.join(names[:NAMED])}{more}. The weights are those "
                "of the step before; the last checkpoint stays"
            )
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each rate and decay; vectors, gates and embeddings do not decay."""
        if self.optimizer is None:
            optimizer = self.recipe.optimizer
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if not parameter.requires_grad:
                    continue
                rates = optimizer.rates
                part = next((part for part, starts in PARTS.items() if name.startswith(starts)), "")
                factor = rates.get("alpha", rates.get(part, 1.0)) if name.endswith(".alpha") else rates.get(part, 1.0)
                plain = parameter.ndim < 2 or "embed" in name
                groups.setdefault((factor, 0.0 if plain else optimizer.decay), []).append(parameter)
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                [{"params": p, "lr": optimizer.rate * f, "weight_decay": d} for (f, d), p in groups.items()],
                lr=optimizer.rate,
                betas=(optimizer.beta1, optimizer.beta2),
            )
        return self.optimizer

    def end_step(self, state: Any, control: Any) -> None:
        """Records a step; the processes add up what each has seen."""
        for batch in self.batches:
            self.cursors[batch.lane] = batch.cursor
        broken = [line for batch in self.batches for line in batch.broken]
        layouts = [self.geometry.layout(*size) for batch in self.batches for size in batch.sizes]
        views = sum(layout.num_views for layout in layouts)
        lengths = [length for batch in self.batches for length in batch.lengths]
        forward = forward_flops(self.config, lengths, layouts)
        learned = sum(int((batch.inputs["labels"][:, 1:] != -100).sum()) for batch in self.batches)
        own = {
            "loss": float(torch.stack(self.losses).sum()) / self.args.world_size,
            "tokens": sum(lengths),
            "room": sum(batch.room for batch in self.batches),
            "learned": learned,
            "images": len(layouts),
            "views": views,
            "flops": step_flops(forward, self.recipe.model.trains),
            "broken": len(broken),
            "stop": float(self.terminated),
        }
        sums = torch.tensor([own[name] for name in SUMS], dtype=torch.float64)
        if dist.is_initialized():
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        row = dict(zip(SUMS, sums.tolist(), strict=True))
        if row.pop("stop"):
            control.should_save = control.should_training_stop = True
        now = time.monotonic()
        seconds, self._before = now - self._before, now
        self._note(broken)
        if self.is_world_process_zero():
            self._log_step(state, row, seconds)

    def _log_step(self, state: Any, row: dict[str, float], seconds: float) -> None:
        tokens, room, flops = row.pop("tokens"), row.pop("room"), row.pop("flops")
        entry: dict[str, float] = {"step": state.global_step, "loss": row.pop("loss"), "grad_norm": self.norm}
        entry |= {name: int(value) for name, value in row.items()}
        entry |= {"tokens": int(tokens), "padding": round(1 - tokens / room, 4) if room else 0.0}
        if self._gates_here():
            entry |= {f"alpha{i}": fusion.opening() or 0.0 for i, fusion in enumerate(self.gates)}
        entry |= {"lr": self._get_learning_rate(), "seconds": round(seconds, 3)}
        entry |= {"tokens_per_s": round(tokens / seconds, 1), "images_per_s": round(row["images"] / seconds, 2)}
        if peak := self._peak_flops():
            entry["mfu"] = round(flops / seconds / (peak * self.args.world_size), 4)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.progress = entry
        if state.global_step % self.recipe.run.log_every == 0 or state.global_step == state.max_steps:
            words = " ".join(f"{k} {v:.5g}" for k, v in entry.items())
            print(f"{words} left {(state.max_steps - state.global_step) * seconds / 60:.0f} min", flush=True)

    def _gates_here(self) -> bool:
        """A sharded gate would have to be gathered by every process for one of them to read it."""
        return not any(hasattr(parameter, "full_tensor") for gate in self.gates for parameter in gate.parameters())

    def _peak_flops(self) -> float | None:
        given = self.recipe.run.peak_tflops
        if given is None and self.args.device.type == "cuda":
            name = torch.cuda.get_device_name()
            given = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        return given * 1e12 if given else None

    def _note(self, broken: list[str]) -> None:
        new = [line for line in dict.fromkeys(broken) if line not in self.seen_broken]
        if new:
            self.seen_broken.update(new)
            with (self.folder / "broken.txt").open("a") as file:
                file.writelines(f"{line}\n" for line in new)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {k: v for k, v in self.progress.items() if k not in ("step", *logs)}, start_time)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / files.UNFINISHED) if self._saving else str(self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside the others, and gives it its name when all of it is on the disk."""
        step = self.state.global_step
        unfinished = self.folder / files.UNFINISHED
        written = unfinished / f"{files.PREFIX}{step}"
        self._saving = True
        try:
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)
            self._meet()
            super()._save_checkpoint(model, trial)
            parts = [self.cursors]
            if dist.is_initialized():
                parts = [None] * self.args.world_size  # type: ignore[list-item]
                dist.all_gather_object(parts, self.cursors)
            self._meet()
            if self.is_world_process_zero():
                cursors = {str(lane): cursor for part in parts for lane, cursor in part.items()}
                files.write_json(written / "data.json", {"cursors": cursors, "facts": self.facts})
                files.finish(written, self.folder / written.name)
                files.drop_old(self.folder, self.recipe.run.keep)
            self._meet()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            last = files.checkpoints(self.folder)
            good = f"the last one, {last[-1].name}, is whole" if last else "there was none before"
            raise TrainingError(f"step {step}: the checkpoint could not be written ({error}); {good}") from error
        finally:
            self._saving = False

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def stop_at_sigterm(self) -> None:
        """SIGTERM ends the run behind the step in progress, with a checkpoint."""

        def note(number: int, frame: Any) -> None:
            self.terminated = True

        signal.signal(signal.SIGTERM, note)


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: FilaTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step(state, control)

"""Trains `fila-nano`, stage by stage, resumable at any moment.

    python -m recipes.nano.train text   --out runs/nano      # stage 0, its two halves
    python -m recipes.nano.train vision --out runs/nano
    python -m recipes.nano.train align  --out runs/nano      # stage 1
    python -m recipes.nano.train tune   --out runs/nano      # stage 2

Each stage writes `<stage>.pt` (state, averaged weights, optimiser, step) and `<stage>.csv` (the log) into the folder
and goes on from them when started again. A stage begins with what the stages before it have learned.

A stage that goes on needs the settings it began with: `--steps`, `--batch`, `--lr`, `--freeze`, `--seed`, `--preset`,
`--tile`, `--init`, the fonts, the number of processes, and what the stages before it learned; `--threads`, `--workers`
and `--save-minutes` are free. `--init` is one for a folder: it stands in for the stages before that are missing there,
and the others must have begun with the same one. A loss or gradient that is not finite ends the run and leaves the last
checkpoint. Every refusal is one line and exit code 1.

`vision` needs neither: without the tokens of `text` to aim at, it leaves the loss `grid` out, says so, and its
projector stays as it was. `align` and `tune` leave it out too where `--init` holds no such tokens.

On several cores, one process a core is faster than one process with several threads; each takes its share of a batch:

    torchrun --nproc-per-node 2 -m recipes.nano.train tune --out runs/nano --threads 1
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from fila.configuration import FilaConfig, preset
from fila.errors import memory_for, one_line
from fila.geometry import Geometry
from fila.image_processing import FilaImageProcessor
from fila.modeling import FilaForConditionalGeneration
from recipes.nano.data import Batches, Pages, loader
from recipes.nano.depthwise import quicken
from recipes.nano.guidance import HEADS
from recipes.nano.pages.fonts import FONT_LIST, FontSet
from recipes.nano.run_folder import Log, RunError, check_weights, identity, locked, read, restore, save
from recipes.nano.stages import STAGES, Stage, Trainee
from recipes.nano.tokenizer import build_character_tokenizer

PREDECESSORS = {"text": (), "vision": ("text",), "align": ("text", "vision"), "tune": ("text", "vision", "align")}
SEEDS = {"vision": 0, "text": 10_000_000, "align": 200_000_000, "tune": 300_000_000}  # no page is met in two stages
MOST_SEED = 2**63  # torch's generators take no more
TILE = 96  # canvas pixels, the preset's; 64 held ten lines a page
HELPERS = Path("training/helpers.safetensors")  # in a checkpoint's folder: heads and grid text
ALPHA_RATE = 10.0
WEIGHT_DECAY = 0.02
CLIP = 1.0
EMA_DECAY = 0.998


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.train", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--preset", default="fila-nano")
    parser.add_argument("--tile", type=int, default=TILE, help="side of a tile, canvas pixels")
    parser.add_argument(
        "--init", type=Path, help="weights to begin with, see begin_with; stages before this may then be missing"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the recipe's")
    parser.add_argument("--batch", type=int, help="pages per step instead of the recipe's")
    parser.add_argument("--lr", type=float, help="peak learning rate instead of the recipe's")
    parser.add_argument(
        "--freeze", nargs="+", default=[], metavar="NAME",
        help="parts that stay as they are, by the first words of their parameters' names",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pages")
    parser.add_argument("--builtin-font", action="store_true", help="Pillow's own face instead of the listed fonts")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    args = parser.parse_args(argv)
    given = {k: v for k, v in (("steps", args.steps), ("batch", args.batch), ("lr", args.lr)) if v is not None}
    stage = replace(STAGES[args.stage], **given)
    try:
        check_numbers(args, stage)
        torch.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        first = os.environ.get("RANK", "0") == "0"  # it alone writes
        lock = locked(args.out, args.stage, PREDECESSORS[args.stage]) if first else nullcontext()
        with lock, memory_for(f"stage {args.stage!r}"):
            train(args, args.stage, stage)
    except (RunError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_numbers(args: argparse.Namespace, stage: Stage) -> None:
    """Refuses numbers that no run can have."""
    for name, value, least in (
        ("tile", args.tile, 1),
        ("steps", stage.steps, 1),
        ("batch", stage.batch, 1),
        ("seed", args.seed, 0),
        ("threads", args.threads, 1),
        ("workers", args.workers, 0),
        ("save-minutes", args.save_minutes, 0),
    ):
        if not value >= least:
            raise RunError(f"--{name}: expected {least} or more, got {value}")
    if args.seed >= MOST_SEED:
        raise RunError(f"--seed: expected less than {MOST_SEED}, got {args.seed}")
    if not (stage.lr > 0 and math.isfinite(stage.lr)):
        raise RunError(f"--lr: expected a positive number, got {stage.lr}")


def train(args: argparse.Namespace, name: str, stage: Stage) -> None:
    """Runs one stage to its end, from its last checkpoint if there is one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if stage.batch % world:
        raise RunError(f"expected a batch that {world} processes can share, got {stage.batch}")
    if world > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    try:
        trainee, geometry = build(args.preset, cropping=stage.cropping, tile=args.tile)
    except ValueError as error:
        raise RunError(f"--preset {args.preset} --tile {args.tile}: {one_line(error)}") from error
    frozen = tuple(sorted(set(args.freeze)))
    trainee.freeze(stage, frozen)
    check_frozen(trainee, frozen)
    origins = begin(trainee, name, args.out, args.init)
    if not (trainee.has_target or name == "text"):
        if name == "vision":  # no other loss of it reaches the projector
            trainee.model.multi_modal_projector.requires_grad_(False)
        if not rank:
            print(f"{name}: no tokens of stage 'text' to aim at: the loss 'grid' is left out", flush=True)
    learning = {n: p for n, p in trainee.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(learning, stage.lr)
    # Of the frozen parts too: the next stage and the export take what a stage leaves from its averages alone.
    average = {n: p.detach().clone() for n, p in trainee.named_parameters() if n.startswith(stage.trains)}
    checkpoint = args.out / f"{name}.pt"
    fonts = FontSet.builtin() if args.builtin_font else FontSet.installed("train")
    settings = asdict(stage) | origins | {"freeze": frozen}
    settings |= {"preset": args.preset, "tile": args.tile, "seed": args.seed, "processes": world}
    settings |= {"fonts": "built-in" if args.builtin_font else identity(FONT_LIST)}
    step = restore(checkpoint, settings, learning, average, optimizers)
    if step:
        print(f"{name}: going on from step {step}", flush=True)

    tokenizer = build_character_tokenizer()
    length = stage.steps * stage.batch
    pages = Pages(
        FilaImageProcessor.from_geometry(geometry),
        tokenizer,
        geometry,
        fonts,
        split="train",
        seed=args.seed + SEEDS[name],
        length=length,
        render=name != "text",
        shares=stage.shares,
        absent=stage.absent,
    )
    log = None if rank else Log(args.out / f"{name}.csv", settings, step)
    trainee.train()
    saved_at = time.monotonic()
    for batch in loader(Batches(pages, stage.batch, rank, world), step, args.workers):
        rate = set_rate(optimizers, step, stage)
        with torch.autocast("cpu", torch.bfloat16):
            losses = trainee(name, batch)
        dense = stage.dense[0] + (stage.dense[1] - stage.dense[0]) * step / stage.steps
        total = sum(loss * weight_of(part, dense) for part, loss in losses.items())
        trainee.zero_grad(set_to_none=True)
        total.backward()
        if world > 1:
            average_gradients(learning.values(), world)
        norm = nn.utils.clip_grad_norm_(learning.values(), CLIP)
        step += 1
        if not (torch.isfinite(norm) and all(loss.isfinite() for loss in losses.values())):
            values = ", ".join(f"{part} {loss.item():.4g}" for part, loss in losses.items())
            raise RunError(f"step {step}: loss or gradient is not finite: {values}, gradient norm {norm.item():.4g}")
        for optimizer in optimizers:
            optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_([average[n] for n in learning], [p.detach() for p in learning.values()], 1 - decay)
        if log is None:
            continue
        log.add(step, stage.steps, losses, norm, rate, trainee.model.vision_tower.fusion)
        if step == stage.steps or time.monotonic() - saved_at > args.save_minutes * 60:
            state = {"learning": {n: p.detach() for n, p in learning.items()}, "average": average, "step": step}
            save(checkpoint, state | {"optimizers": [o.state_dict() for o in optimizers], "settings": settings})
            saved_at = time.monotonic()
    if world > 1:
        distributed.destroy_process_group()


def check_frozen(trainee: Trainee, frozen: Sequence[str]) -> None:
    """Refuses the name of a part that the model lacks, and names that leave nothing to train."""
    names = [name for name, _ in trainee.named_parameters(remove_duplicate=False)]
    for part in frozen:
        if not part or not any(name.startswith(part) for name in names):
            raise RunError(f"--freeze: expected the first words of parameters' names, got {part!r}")
    if not any(parameter.requires_grad for parameter in trainee.parameters()):
        raise RunError("--freeze: expected something left to train, got all of the stage's parts")


def weight_of(part: str, dense: float) -> float:
    """The weight of a loss; `dense` is the weight of the character map's now."""
    return 1.0 if part == "answer" else HEADS[part].weight if part in HEADS else dense


def begin(trainee: Trainee, name: str, folder: Path, init: Path | None) -> dict[str, Any]:
    """Loads what a stage begins with: `--init`, and over it what the stages before have learned.

    Returns both for the settings, and whether they hold the tokens that the loss `grid` aims at. A stage before that
    began with another `--init` is refused: the one given now would be lost under its weights.
    """
    origin = identity(init) if init else None
    before = {stage: folder / f"{stage}.pt" for stage in PREDECESSORS[name]}
    loaded = set(begin_with(trainee, init)) if init else set()
    if init or name == "vision":
        before = {stage: path for stage, path in before.items() if path.exists()}
    for stage, path in before.items():
        if not path.exists():
            raise RunError(f"{path}: missing; stage {name!r} needs stage {stage!r} to be trained first, or --init")
        saved = read(path)
        settings = saved.get("settings", {})
        if settings.get("init") != origin:
            raise RunError(f"{path}: began with --init {settings.get('init')}, stage {name!r} is given {origin}")
        trains = STAGES[stage].trains
        check_weights(saved["average"], {n: p for n, p in trainee.named_parameters() if n.startswith(trains)}, path)
        trainee.load_state_dict(saved["average"], strict=False)
        loaded |= saved["average"].keys()
    trainee.has_target = {f"grid_text.{n}" for n, _ in trainee.grid_text.named_parameters()} <= loaded
    found = {stage: identity(path) for stage, path in before.items()}
    return {"init": origin, "before": found, "grid": trainee.has_target}


def begin_with(trainee: Trainee, folder: Path) -> Iterable[str]:
    """Loads averaged weights, of one stage (`<stage>.pt`) or of all (`.safetensors`), or a checkpoint folder's.

    Returns their names. A checkpoint folder of another tile size gets its ViT positions interpolated; one of the same
    size may hold what only training needs (`HELPERS`).
    """
    if folder.suffix == ".pt":
        learned, known = read(folder)["average"], dict(trainee.named_parameters())
        check_weights(learned, {name: known[name] for name in learned if name in known}, folder)
        trainee.load_state_dict(learned, strict=False)
        return learned
    if folder.suffix == ".safetensors":
        weights, known = read_weights(folder), dict(trainee.named_parameters())
        check_weights(weights, {name: known[name] for name in weights if name in known}, folder)
        trainee.load_state_dict(weights, strict=False)
        return weights
    weights = read_weights(folder / "model.safetensors")
    known = dict(trainee.export.named_parameters())  # a tied weight is stored once, and is here once
    position = trainee.export.model.vision_tower.vit.embeddings.position_embedding.weight
    name = next(n for n, p in known.items() if p is position)
    old, new = (math.isqrt(len(w) - 1) for w in (weights.get(name, position), position))
    if old != new:
        grid = weights[name][1:].T.reshape(1, -1, old, old)
        grid = nn.functional.interpolate(grid, (new, new), mode="bilinear", align_corners=True)
        weights[name] = torch.cat([weights[name][:1], grid.flatten(2)[0].T])
    check_weights(weights, known, folder)
    trainee.export.load_state_dict(weights, strict=False)
    if old != new or not (folder / HELPERS).exists():
        return weights
    return [*weights, *begin_with(trainee, folder / HELPERS)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32."""
    try:
        return {name: weight.float() for name, weight in load_file(path).items()}
    except SafetensorError as error:
        raise RunError(f"{path}: its weights are damaged ({error})") from error


def average_gradients(parameters: Iterable[Tensor], world: int) -> None:
    """Every process's gradients become their mean, sent as one tensor."""
    parameters = list(parameters)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.div_(world).split([g.numel() for g in grads]), strict=True):
        parameter.grad = part.view_as(parameter)


def build(name: str, cropping: bool = True, tile: int = TILE) -> tuple[Trainee, Geometry]:
    """A fresh model of that preset with its training heads, set to crop or not, and the geometry that follows."""
    config = with_tile(preset(name), tile)
    if not cropping:
        config.vision_config.high_res_rule = "direct"
    trainee = Trainee(FilaForConditionalGeneration(config))
    quicken(trainee)
    return trainee, config.vision_config.geometry()


def with_tile(config: FilaConfig, tile: int) -> FilaConfig:
    """The configuration with tiles of another side: canvases and raster grow with it, patches stay."""
    fields = config.to_dict()
    vision, old = fields["vision_config"], config.vision_config.image_size
    vision["vit_config"]["image_size"] = tile
    vision["image_grid_pinpoints"] = [[side * tile // old for side in c] for c in vision["image_grid_pinpoints"]]
    vision["high_res_size"] = vision["high_res_size"] * tile // old
    fields["text_config"]["max_position_embeddings"] = 2048  # three tiles of 96 and some twenty questions
    for copied in ("image_grid_pinpoints", "image_seq_length", "vision_feature_layer"):
        fields.pop(copied, None)
    return FilaConfig(**fields)


def make_optimizers(learning: Mapping[str, Tensor], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the towers, AdamW for the rest, with gates faster and nothing but kernels decayed."""
    matrices, kernels, plain, gates = [], [], [], []
    for name, parameter in learning.items():
        if name.endswith(".alpha"):
            gates.append(parameter)
        elif parameter.ndim < 2 or "embed" in name:
            plain.append(parameter)
        elif parameter.ndim == 2 and not name.startswith("heads"):
            matrices.append(parameter)
        else:
            kernels.append(parameter)
    groups = [
        {"params": kernels, "weight_decay": WEIGHT_DECAY, "factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "factor": 1.0},
        {"params": gates, "weight_decay": 0.0, "factor": ALPHA_RATE},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [g for g in groups if g["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True))
    if matrices:  # Muon's steps have AdamW's size, so that one rate serves both
        group = {"params": matrices, "factor": 1.0}
        optimizers.append(torch.optim.Muon([group], lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    progress = step / max(1, stage.steps)
    rate = stage.lr * min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
    return rate


if __name__ == "__main__":
    sys.exit(main())

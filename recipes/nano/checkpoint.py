"""Turns a finished run into a checkpoint that users load, and keeps the run's record beside it.

    python -m recipes.nano.checkpoint --run runs/nano --out fila/pretrained/fila-nano

Writes bf16 safetensors with configuration, processor and tokenizer. The logs of the stages go into `training/` there,
and what only training needs, so that another run may begin with the folder (`train --init`). Refused in one line, with
exit code 1: a damaged checkpoint, other weights than the preset's, weights that are not finite, and a run whose gates
all ended closed (its ConvNeXt was never used).

    python -m recipes.nano.checkpoint --run runs/nano --stage vision --weights stage0.safetensors

writes what a run has learned up to a stage, training heads included, for another run to begin with (`train --init`).
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fila.image_processing import FilaImageProcessor
from fila.processing import FilaProcessor
from recipes.nano.pages.sheet import CAPS
from recipes.nano.run_folder import RunError, check_weights, not_finite, read
from recipes.nano.stages import STAGES
from recipes.nano.tokenizer import build_character_tokenizer
from recipes.nano.train import HELPERS, PREDECESSORS, TILE, build

LEAST_GATE = 0.05


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.checkpoint", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="folder written by recipes.nano.train")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder of the checkpoint")
    target.add_argument("--weights", type=Path, help="file of weights to begin another run with")
    parser.add_argument("--stage", default="tune", choices=STAGES, help="stage whose averaged weights are taken")
    parser.add_argument("--preset", default="fila-nano")
    parser.add_argument("--tile", type=int, default=TILE, help="the run's own")
    args = parser.parse_args(argv)
    try:
        if args.weights:
            write_weights(args)
        else:
            export(args)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_weights(args: argparse.Namespace) -> None:
    """Joins what the stages up to one have learned."""
    learned: dict[str, torch.Tensor] = {}
    for stage in (*PREDECESSORS[args.stage], args.stage):
        learned |= read(args.run / f"{stage}.pt")["average"]
    learned = {n: value.to(torch.bfloat16).contiguous() for n, value in learned.items()}
    if name := not_finite(learned):
        raise RunError(f"{args.run}: {name} is not finite in bfloat16")
    save_file(learned, args.weights)


def export(args: argparse.Namespace) -> None:
    """Checks everything, then writes."""
    trainee, geometry = build(args.preset, tile=args.tile)
    path = args.run / f"{args.stage}.pt"
    saved = read(path)
    check_weights(saved["average"], dict(trainee.named_parameters()), path)
    trainee.load_state_dict(saved["average"], strict=False)  # not strict: a tied weight is stored once
    model = trainee.export
    gates = [fusion.alpha.item() for fusion in model.model.vision_tower.fusion]
    if max(map(abs, gates)) < LEAST_GATE:
        raise RunError(f"expected a gate of at least {LEAST_GATE}, got {gates}: the ConvNeXt was never used")
    model.config.smallest_capital = CAPS[0]
    model.to(torch.bfloat16)
    if name := not_finite(model.state_dict()):
        raise RunError(f"{path}: {name} is not finite in bfloat16")
    model.save_pretrained(args.out)
    FilaProcessor(FilaImageProcessor.from_geometry(geometry), build_character_tokenizer()).save_pretrained(args.out)
    record = args.out / "training"
    record.mkdir(exist_ok=True)
    for stage in STAGES:
        log = args.run / f"{stage}.csv"
        if log.exists():
            shutil.copy(log, record / log.name)
    size = sum(f.stat().st_size for f in args.out.glob("*.safetensors")) / 1e6
    known = set(dict(model.named_parameters()))
    helpers = {n: v.to(torch.bfloat16).contiguous() for n, v in saved["average"].items() if n not in known}
    save_file(helpers, record / HELPERS.name)
    print(f"step {saved['step']} of {args.stage}; gates {[round(g, 3) for g in gates]}; {size:.1f} MB at {args.out}")


if __name__ == "__main__":
    sys.exit(main())

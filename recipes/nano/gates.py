"""Measures whether a stage has learned what the next one builds on, on held-out fonts and words.

    python -m recipes.nano.gates vision --run runs/nano        # characters that the fused tokens name
    python -m recipes.nano.gates text   --run runs/nano        # answers about pages given as characters
    python -m recipes.nano.gates tune   --run runs/nano        # both, from pictures

An answer counts if each of its characters and its end are the likeliest given the characters before: exactly then does
greedy decoding give it. The questions of a page follow each other in one conversation, as in training.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fila.image_processing import FilaImageProcessor
from recipes.nano.data import HELD, IGNORE, NUM_CLASSES, SLOTS, Batches, PageBatch, Pages, loader, view_labels
from recipes.nano.pages.fonts import FontSet
from recipes.nano.stages import Trainee
from recipes.nano.tokenizer import build_character_tokenizer
from recipes.nano.train import TILE, begin_with, build

SEED = 800_000_000  # no page of training, none of the frozen test

Tally = dict[str, list[int]]  # right and all, by what was asked


def right_answers(trainee: Trainee, batch: PageBatch, features: BaseModelOutputWithPooling, tally: Tally) -> None:
    """Adds every question of the batch to the tally of its kind."""
    logits = trainee.export(
        input_ids=batch.inputs["input_ids"], mm_encoder_outputs={"image": features}
    ).logits  # [B, L, vocabulary]
    wanted = batch.labels[:, 1:]
    right = (logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORE)
    for row, kinds in enumerate(batch.kinds):
        asked = wanted[row] != IGNORE
        edges = torch.diff(asked.int(), prepend=torch.zeros(1, dtype=torch.int32)).nonzero().flatten().tolist()
        starts = [e for e in edges if asked[e]]
        for kind, start in zip(kinds, starts, strict=False):  # a transcript may follow
            end = next((e for e in edges if e > start), len(asked))
            for key in (kind, "all"):
                tally[key][0] += bool(right[row, start:end].all())
                tally[key][1] += 1


def right_characters(logits: Tensor, labels: Tensor, tally: Tally) -> None:
    """Adds the characters that patches hold themselves: logits [..., S * K], labels [..., S]."""
    labels = labels.reshape(-1, SLOTS)[:, :HELD]
    said = logits.reshape(-1, SLOTS, NUM_CLASSES)[:, :HELD].argmax(-1)
    there = labels > 0
    tally["characters"][0] += int((said == labels)[there].sum())
    tally["characters"][1] += int(there.sum())


@torch.inference_mode()
def measure(trainee: Trainee, pages: Pages, stage: str, batch_size: int = 8) -> Tally:
    """Right and all of what a stage is judged by."""
    tally: Tally = defaultdict(lambda: [0, 0])
    trainee.eval()
    for batch in loader(Batches(pages, batch_size), 0, workers=0):
        with torch.autocast("cpu", torch.bfloat16):
            if stage == "text":
                right_answers(trainee, batch, trainee.grid_features(batch), tally)
                continue
            images = {k: batch.inputs[k] for k in ("pixel_values", "image_sizes", "high_res_pixel_values")}
            features = trainee.export.get_image_features(**images)
            labels = torch.cat([view_labels(c, lay) for c, lay in zip(batch.characters, batch.layouts, strict=True)])
            right_characters(trainee.heads.tokens(features.last_hidden_state[:, 1:]), labels, tally)
            if stage != "vision":
                right_answers(trainee, batch, features, tally)
    return tally


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.gates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("vision", "text", "align", "tune"))
    parser.add_argument("--run", type=Path, required=True, help="folder written by recipes.nano.train")
    parser.add_argument("--count", type=int, default=400, help="pages of each kind")
    parser.add_argument("--preset", default="fila-nano")
    parser.add_argument("--tile", type=int, default=TILE, help="the run's own")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args(argv)
    trainee, geometry = build(args.preset, tile=args.tile)
    begin_with(trainee, args.run / f"{args.stage}.pt")
    report: dict[str, dict[str, list[int]]] = {}
    for source in ("cards", "documents"):
        pages = Pages(
            FilaImageProcessor.from_geometry(geometry),
            build_character_tokenizer(),
            geometry,
            FontSet.installed("test"),
            split="test",
            seed=SEED,
            length=args.count,
            render=args.stage != "text",
            shares={source: 1.0},
        )
        report[source] = dict(sorted(measure(trainee, pages, args.stage).items()))
        for name, (right, count) in report[source].items():
            print(f"{source:10} {name:12} {right / count:6.1%} of {count}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

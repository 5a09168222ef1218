"""Asks a checkpoint about generated pages it has not seen, and scores cut and intact answers apart.

    python -m recipes.nano.evaluate --model fila/pretrained/fila-nano --count 1000 --out score.json

The pages are of the test split: other font families, other words. Needs the fonts that `recipes/nano/pages/fonts.json`
lists. The test is frozen: its pages follow from `SEED`, and their SHA-256 is compared before a score of all of them is
written.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from fila.inference import answer_batch, load
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import Sample, make_sample
from recipes.nano.score import Answered, report

SEED, COUNT = 900_000_000, 1000  # the frozen test
PICTURES = "cc5ff9d18915bf235c223beccc9aa95b8f11b0a0533535e94b772f4197ee28ec"
LABELS = "42f52360dc9d5b311a83b3ba518fe128fe0eb9861a38f4e56709c978f6dc8f2c"
LONGEST = 16  # tokens: twelve characters, the end, and room to be wrong in


def predict(model: FilaForConditionalGeneration, processor: FilaProcessor, samples: list[Sample]) -> list[str]:
    """Greedy answers to each sample's own question, as one batch, by the decoding that `fila ask` uses."""
    images: list[Any] = [s.image for s in samples]
    questions = [s.question for s in samples]
    return [one.text for one in answer_batch(model, processor, images, questions, max_new_tokens=LONGEST)]


class Fingerprint:
    """SHA-256 of pages' pictures and of their labels, each over all pages in order."""

    def __init__(self) -> None:
        self.pictures, self.labels = hashlib.sha256(), hashlib.sha256()

    def add(self, sample: Sample) -> None:
        assert sample.image is not None
        self.pictures.update(str(sample.image.size).encode() + sample.image.tobytes())
        self.labels.update(json.dumps([sample.question, sample.answer, sample.cut, sample.kind]).encode())

    def check(self) -> None:
        """Raises ValueError where the pages are not those of the frozen test."""
        if (self.pictures.hexdigest(), self.labels.hexdigest()) != (PICTURES, LABELS):
            raise ValueError("expected the pictures and labels of the frozen test, got others: check fonts and Pillow")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shipped one by default")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the first page; the others follow")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--builtin-font", action="store_true", help="Pillow's own face instead of the listed fonts")
    parser.add_argument("--out", type=Path, help="write the report here as JSON, and the answers beside it (.jsonl)")
    args = parser.parse_args(argv)
    model, processor = load(args.model)
    fonts = FontSet.builtin() if args.builtin_font else FontSet.installed(args.split)
    answered, lines, start, fingerprint = [], [], time.monotonic(), Fingerprint()
    for first in range(0, args.count, args.batch):
        seeds = range(args.seed + first, args.seed + min(first + args.batch, args.count))
        samples = [make_sample(seed, split=args.split, fonts=fonts) for seed in seeds]
        for seed, sample, said in zip(seeds, samples, predict(model, processor, samples), strict=True):
            fingerprint.add(sample)
            answered.append(Answered(sample.answer, said, sample.cut, sample.kind))
            lines.append({"seed": seed, "question": sample.question, "answer": sample.answer, "predicted": said,
                          "cut": sample.cut, "kind": sample.kind})  # fmt: skip
        right = sum(a.correct for a in answered)
        left = (time.monotonic() - start) / len(answered) * (args.count - len(answered))
        print(
            f"\r{len(answered)}/{args.count} right {right / len(answered):.1%}, {left:.0f} s left", end="", flush=True
        )
    print()
    if (args.split, args.seed, args.count, args.builtin_font) == ("test", SEED, COUNT, False):
        fingerprint.check()
    scores = report(answered)
    if args.out:
        args.out.write_text(json.dumps({"split": args.split, "seed": args.seed, **scores}, indent=1) + "\n")
        args.out.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for side in ("intact", "cut"):
        s = scores[side]
        print(
            f"{side}: {s['correct']} of {s['count']} right, {s['exact_match']:.1%} ({s['low']:.1%} to {s['high']:.1%})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

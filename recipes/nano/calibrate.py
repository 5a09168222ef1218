"""Fits the confidence of a checkpoint's answers on answers to held-out pages, and writes it into its configuration.

    python -m recipes.nano.evaluate --model MODEL --set documents --seed 920000000 --count 1500 --out answers.json
    python -m recipes.nano.calibrate --model MODEL answers.jsonl

The pages have to be others than those that the calibration error is then measured on. Fitted are Platt's two numbers,
by maximum likelihood, with his targets, which never reach 0 or 1.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from recipes.nano.score import Answered


def fit(means: Sequence[float], right: Sequence[bool]) -> list[float]:
    """Slope and offset of the probability of being right, given mean log-probabilities of answers."""
    if len(set(right)) < 2:
        raise ValueError("expected right and wrong answers, got one kind only")
    yes, no = sum(right), len(right) - sum(right)
    high, low = (yes + 1) / (yes + 2), 1 / (no + 2)
    x = torch.tensor(means, dtype=torch.float64)
    wanted = torch.tensor([high if one else low for one in right], dtype=torch.float64)
    numbers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.binary_cross_entropy_with_logits(numbers[0] * x + numbers[1], wanted)
        found.backward()
        return found

    optimizer.step(loss)
    return [round(value, 4) for value in numbers.tolist()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.calibrate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("answers", type=Path, nargs="+", help="answers that evaluate wrote (.jsonl)")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for path in options.answers for line in path.read_text().splitlines()]
    right = [Answered(line["answer"], line["predicted"], line["cut"], line["kind"]).correct for line in lines]
    numbers = fit([math.log(max(line["token_probability"], 1e-30)) for line in lines], right)
    path = options.model / "config.json"
    settings = json.loads(path.read_text()) | {"answer_calibration": numbers}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    print(f"slope {numbers[0]}, offset {numbers[1]}, from {len(lines)} answers, {sum(right)} of them right")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

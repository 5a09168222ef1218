"""Exact match over answered samples, for cut and intact answers apart, with intervals.

    python -m recipes.nano.score answers.jsonl

reads lines with the keys `answer`, `predicted`, `cut` and `kind` and prints the report as JSON.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_FOUND = "not found"
Z_95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Answered:
    """One sample's right answer and what a model said."""

    answer: str
    predicted: str
    cut: bool
    kind: str
    confidence: float | None = None  # that the answer is right, as the model says

    @property
    def correct(self) -> bool:
        return normalise(self.predicted) == normalise(self.answer)


def normalise(text: str) -> str:
    """The one liberty an answer has: runs of white space count as one space, none at the ends. Case and signs count.

    >>> normalise("  12  Mar\\n2024 ")
    '12 Mar 2024'
    """
    return " ".join(text.split())


def wilson(correct: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) of nothing.

    >>> [round(edge, 3) for edge in wilson(90, 100)]
    [0.826, 0.945]
    """
    if not 0 <= correct <= count:
        raise ValueError(f"expected 0 <= correct <= count, got {correct} of {count}")
    if count == 0:
        return 0.0, 1.0
    share = correct / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def tally(answered: Iterable[Answered]) -> dict[str, Any]:
    """Count, correct, exact match and its 95 % interval; exact match is None of nothing."""
    hits = [one.correct for one in answered]
    low, high = wilson(sum(hits), len(hits))
    return {
        "count": len(hits),
        "correct": sum(hits),
        "exact_match": sum(hits) / len(hits) if hits else None,
        "low": low,
        "high": high,
    }


def report(answered: Iterable[Answered]) -> dict[str, Any]:
    """The tallies of all, of cut and intact answers, and of every kind by both, and what `not_found` and
    `calibration_error` say; ready for `json.dump`.
    """
    rows = list(answered)
    sides = {"cut": [r for r in rows if r.cut], "intact": [r for r in rows if not r.cut]}
    kinds = sorted({r.kind for r in rows})
    return {
        "all": tally(rows),
        **{side: tally(found) for side, found in sides.items()},
        "kinds": {
            kind: {side: tally(r for r in found if r.kind == kind) for side, found in sides.items()} for kind in kinds
        },
        "not_found": not_found(rows),
        "calibration_error": calibration_error(rows),
    }


def not_found(rows: Iterable[Answered]) -> dict[str, Any]:
    """How often "not found" is said of what is there (`false`), and something else of what is not (`invented`)."""
    answered = list(rows)
    there = [r for r in answered if r.answer != NOT_FOUND]
    absent = [r for r in answered if r.answer == NOT_FOUND]
    false, invented = sum(normalise(r.predicted) == NOT_FOUND for r in there), sum(not r.correct for r in absent)
    return {
        "false": {"count": len(there), "said": false, "share": false / len(there) if there else None},
        "invented": {"count": len(absent), "said": invented, "share": invented / len(absent) if absent else None},
    }


def calibration_error(rows: Iterable[Answered], bins: int = 10) -> float | None:
    """Expected calibration error over bins of equal width: the mean gap between being sure and being right.

    None where an answer carries no confidence.
    """
    answered = list(rows)
    gaps = [0.0] * bins
    for row in answered:
        if row.confidence is None:
            return None
        gaps[min(int(row.confidence * bins), bins - 1)] += row.confidence - row.correct
    return sum(map(abs, gaps)) / len(answered) if answered else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.score", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("answers", type=Path, help="JSON lines with answer, predicted, cut and kind")
    options = parser.parse_args(arguments)
    rows = []
    for number, line in enumerate(options.answers.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            rows.append(
                Answered(entry["answer"], entry["predicted"], entry["cut"], entry["kind"], entry.get("confidence"))
            )
        except (ValueError, KeyError, TypeError) as error:
            parser.error(f"{options.answers}:{number}: expected answer, predicted, cut and kind, got {error!r}")
    print(json.dumps(report(rows), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

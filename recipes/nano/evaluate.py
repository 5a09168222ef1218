"""Asks a checkpoint about pages it has not seen, and scores cut and intact answers and every kind of question apart.

    python -m recipes.nano.evaluate --model fila/pretrained/fila-nano --count 1000 --out score.json

    --set test        the frozen test: cards of other font families and other words; one question a page
    --set documents   pages as people have them, of the same fonts and words, some questions for what is not there; the
                      kind that was asked least so far is asked
    --set foreign     the hundred pages made by other means, `recipes/nano/foreign`

The first two need the fonts that `recipes/nano/pages/fonts.json` lists. The pages of the test follow from `SEED`, and
their SHA-256 is compared before a score of all of them is written. With `--out`, answers are kept as they come, and a
run that was interrupted goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fila.checkpoints.check import SHIPPED, WEIGHTS
from fila.geometry import Geometry
from fila.inference import Answer, answer_batch, load
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor
from recipes.nano.foreign import foreign_questions
from recipes.nano.pages import sources
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import Sample, make_sample
from recipes.nano.score import Answered, report

SEED, COUNT = 900_000_000, 1000  # the frozen test
DOCUMENTS_SEED, ABSENT = 910_000_000, 0.15  # share of absent among the questions to choose from
PICTURES = "cc5ff9d18915bf235c223beccc9aa95b8f11b0a0533535e94b772f4197ee28ec"
LABELS = "42f52360dc9d5b311a83b3ba518fe128fe0eb9861a38f4e56709c978f6dc8f2c"
LONGEST = 24  # tokens: twenty characters, the end, and room to be wrong in
TOGETHER = 8  # batches that are sorted by canvas, so that little is padded
LEAST_COUNT = 200  # questions of a kind that is printed


@dataclass(frozen=True)
class Query:
    """A question about a picture; `number` is its place in its set."""

    number: int
    image: Any
    question: str
    answer: str
    cut: bool
    kind: str


def predict(model: FilaForConditionalGeneration, processor: FilaProcessor, queries: list[Query]) -> list[Answer]:
    """Greedy answers as one batch, by the decoding that `fila ask` uses."""
    images, questions = [query.image for query in queries], [query.question for query in queries]
    return answer_batch(model, processor, images, questions, max_new_tokens=LONGEST)


class Fingerprint:
    """SHA-256 of pages' pictures and of their labels, each over all pages in order."""

    def __init__(self) -> None:
        self.pictures, self.labels = hashlib.sha256(), hashlib.sha256()

    def add(self, page: Sample | Query) -> None:
        assert page.image is not None
        self.pictures.update(str(page.image.size).encode() + page.image.tobytes())
        self.labels.update(json.dumps([page.question, page.answer, page.cut, page.kind]).encode())

    def check(self) -> None:
        """Raises ValueError where the pages are not those of the frozen test."""
        if (self.pictures.hexdigest(), self.labels.hexdigest()) != (PICTURES, LABELS):
            raise ValueError("expected the pictures and labels of the frozen test, got others: check fonts and Pillow")


def cards(split: str, fonts: FontSet, seed: int, count: int) -> Iterator[Query]:
    """Each page's own question."""
    for number in range(count):
        sample = make_sample(seed + number, split=split, fonts=fonts)
        yield Query(number, sample.image, sample.question, sample.answer, sample.cut, sample.kind)


def documents(split: str, fonts: FontSet, seed: int, count: int, geometry: Geometry) -> Iterator[Query]:
    """A question of each page, of the kind that was asked least so far; whether a seam cuts is not measured."""
    seen: Counter[str] = Counter()
    shares = {"documents": 1.0}
    for number in range(count):
        page = sources.draw(seed + number, shares, split=split, fonts=fonts, geometry=geometry, absent=ABSENT)
        asked = min(page.asked, key=lambda one: seen[one.kind])
        seen[asked.kind] += 1
        yield Query(number, page.image, asked.question, asked.answer, False, asked.kind)


def foreign() -> Iterator[Query]:
    """Everything that is asked about the foreign pages; whether a seam cuts is not measured."""
    for number, one in enumerate(foreign_questions()):
        with Image.open(one.picture) as image:
            yield Query(number, image.convert("RGB"), one.question, one.answer, False, one.kind)


class Answers:
    """What was answered so far, by the question's number, each kept in a file as soon as it is known.

    Args:
        path: the file, or None to keep nothing. Answers of another model or set in it are refused.
        origin: names the model and the set.
    """

    def __init__(self, path: Path | None, origin: str):
        self.path, self.origin = path, origin
        self.lines: dict[int, dict[str, Any]] = {}
        for text in path.read_text().splitlines() if path and path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # the last line of a run that was killed
                continue
            if line.get("origin") != origin:
                raise ValueError(f"{path}: expected answers of {origin}, got {line.get('origin')}; give another --out")
            self.lines[line["number"]] = line

    def add(self, query: Query, said: Answer) -> None:
        sure = said.token_probability if said.confidence is None else said.confidence
        self.lines[query.number] = {
            "number": query.number, "question": query.question, "answer": query.answer, "predicted": said.text,
            "cut": query.cut, "kind": query.kind, "confidence": sure, "token_probability": said.token_probability,
            "origin": self.origin,
        }  # fmt: skip
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.lines[query.number]) + "\n")

    def rows(self) -> list[Answered]:
        """The answers in the order of the questions."""
        return [
            Answered(line["answer"], line["predicted"], line["cut"], line["kind"], line["confidence"])
            for _, line in sorted(self.lines.items())
        ]


def ask(
    model: FilaForConditionalGeneration,
    processor: FilaProcessor,
    queries: Iterator[Query],
    answers: Answers,
    count: int,
    batch: int,
) -> Fingerprint:
    """Answers what is not answered yet; the fingerprint is over all questions in their order."""
    fingerprint, waiting, start, asked = Fingerprint(), [], time.monotonic(), 0
    geometry = processor.image_processor.geometry
    for query in queries:
        fingerprint.add(query)
        if query.number not in answers.lines:
            waiting.append(query)
        if query.number + 1 < count and len(waiting) < TOGETHER * batch:
            continue
        waiting.sort(key=lambda one: geometry.layout(one.image.height, one.image.width).canvas)
        for first in range(0, len(waiting), batch):
            some = waiting[first : first + batch]
            for one, said in zip(some, predict(model, processor, some), strict=True):
                answers.add(one, said)
            asked += len(some)
            rows = answers.rows()
            left = (time.monotonic() - start) / asked * (count - len(rows))
            right = sum(row.correct for row in rows) / len(rows)
            print(f"\r{len(rows)}/{count} right {right:.1%}, {left:.0f} s left", end="", flush=True)
        waiting = []
    print()
    return fingerprint


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shipped one by default")
    parser.add_argument("--set", choices=("test", "documents", "foreign"), default="test", help="pages, see above")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, help="seed of the first page; the others follow")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--builtin-font", action="store_true", help="Pillow's own face instead of the listed fonts")
    parser.add_argument("--out", type=Path, help="write the report here as JSON, and the answers beside it (.jsonl)")
    args = parser.parse_args(argv)
    model, processor = load(args.model)
    folder = args.model or SHIPPED
    files = b"".join((folder / name).read_bytes() for name in (WEIGHTS, "config.json"))
    digest = hashlib.sha256(files).hexdigest()[:12]
    fonts = None
    if args.set != "foreign":
        fonts = FontSet.builtin() if args.builtin_font else FontSet.installed(args.split)
    seed = args.seed if args.seed is not None else DOCUMENTS_SEED if args.set == "documents" else SEED
    origin = f"{digest}/{args.set}/{args.split}/{seed}/{'built-in' if args.builtin_font else 'listed'}"
    answers = Answers(args.out.with_suffix(".jsonl") if args.out else None, origin)
    count = args.count
    if fonts is None:
        queries, count = foreign(), len(foreign_questions())
    elif args.set == "documents":
        queries = documents(args.split, fonts, seed, count, processor.image_processor.geometry)
    else:
        queries = cards(args.split, fonts, seed, count)
    fingerprint = ask(model, processor, queries, answers, count, args.batch)
    if (args.set, args.split, seed, count, args.builtin_font) == ("test", "test", SEED, COUNT, False):
        fingerprint.check()
    scores = report(answers.rows())
    if args.out:
        head = {"set": args.set, "split": args.split, "seed": seed}
        args.out.write_text(json.dumps(head | scores, indent=1) + "\n")
        lines = [json.dumps(line) + "\n" for _, line in sorted(answers.lines.items())]
        args.out.with_suffix(".jsonl").write_text("".join(lines))
    show(scores, args.set, model.config.answer_calibration is not None)
    return 0


def show(scores: dict[str, Any], name: str, calibrated: bool) -> None:
    """Prints the scores; of the kinds those with enough questions."""
    rows = {side: scores[side] for side in (("intact", "cut") if name == "test" else ("all",))}
    kinds = {kind: [side for side in sides.values() if side["count"]] for kind, sides in scores["kinds"].items()}
    for kind, sides in kinds.items():
        total, right = sum(s["count"] for s in sides), sum(s["correct"] for s in sides)
        if total >= LEAST_COUNT:
            print(f"{kind}: {right} of {total} right, {right / total:.1%}")
    for side, s in rows.items():
        if s["count"]:
            share = f"{s['exact_match']:.1%} ({s['low']:.1%} to {s['high']:.1%})"
            print(f"{side}: {s['correct']} of {s['count']} right, {share}")
    for what, s in scores["not_found"].items():
        if s["count"]:
            named = "false not found" if what == "false" else "invented answers"
            print(f"{named}: {s['said']} of {s['count']}, {s['share']:.1%}")
    sure = "confidence" if calibrated else "token probability, not calibrated"
    print(f"expected calibration error of the {sure}: {scores['calibration_error']:.3f}")


if __name__ == "__main__":
    sys.exit(main())

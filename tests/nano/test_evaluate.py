"""The evaluation goes on where it stopped, asks of every kind, and a calibration is fitted on what it kept."""

import json
import math
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
from PIL import Image

from fila.confidence import calibrated
from fila.image_processing import FilaImageProcessor
from recipes.nano import calibrate, evaluate, score
from recipes.nano.evaluate import Answers, Query
from recipes.nano.pages.fonts import FontSet
from recipes.nano.score import Answered
from recipes.nano.train import build

GEOMETRY = build("fila-nano")[1]
PROCESSOR = SimpleNamespace(image_processor=FilaImageProcessor.from_geometry(GEOMETRY))


def queries(count: int):
    for number in range(count):
        image = Image.new("RGB", (100, 100 + 100 * (number % 3)), (number, 0, 0))
        yield Query(number, image, f"What {number}?", str(number), number % 2 == 0, "number")


def test_an_interrupted_evaluation_goes_on_and_sees_every_page(tmp_path, monkeypatch) -> None:
    asked: list[int] = []

    def predict(model, processor, some):
        asked.extend(query.number for query in some)
        if len(asked) > 30:
            raise KeyboardInterrupt
        return [SimpleNamespace(text=query.answer, confidence=None, token_probability=0.5) for query in some]

    monkeypatch.setattr(evaluate, "predict", predict)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate.ask(None, PROCESSOR, queries(40), Answers(path, "a"), 40, 4)
    kept = Answers(path, "a")
    assert 24 <= len(kept.lines) < 40
    path.write_text(path.read_text() + '{"number": 39, "ques')  # killed while it wrote
    asked.clear()
    kept = Answers(path, "a")
    done = set(kept.lines)
    prints = evaluate.ask(None, PROCESSOR, queries(40), kept, 40, 4)
    assert sorted(asked) == [number for number in range(40) if number not in done]
    assert [row.answer for row in kept.rows()] == [str(number) for number in range(40)]
    whole = evaluate.Fingerprint()
    for query in queries(40):
        whole.add(query)
    assert prints.pictures.hexdigest() == whole.pictures.hexdigest()
    with pytest.raises(ValueError, match="expected answers of b, got a"):
        Answers(path, "b")


def test_batches_hold_like_canvases(monkeypatch) -> None:
    sizes: list[int] = []

    def predict(model, processor, some):
        sizes.append(len({query.image.size for query in some}))
        return [SimpleNamespace(text="", confidence=0.5, token_probability=0.5) for _ in some]

    monkeypatch.setattr(evaluate, "predict", predict)
    evaluate.ask(None, PROCESSOR, queries(48), Answers(None, "a"), 48, 4)
    assert max(sizes) <= 2
    assert sizes.count(1) >= 2 * sizes.count(2)


def test_documents_are_asked_of_the_kinds_that_are_rare_too() -> None:
    found = list(evaluate.documents("train", FontSet.builtin(), 0, 80, GEOMETRY))
    kinds = Counter(query.kind for query in found)
    assert kinds["absent"] > 3
    assert kinds["field"] < 24
    assert len(kinds) > 10


def test_foreign_pages_are_asked_in_their_order() -> None:
    found = list(evaluate.foreign())
    assert [query.number for query in found] == list(range(len(found)))
    assert sum(query.kind != "absent" for query in found) == 200
    assert all(query.image.mode == "RGB" for query in found)


def test_false_and_invented_answers_are_counted_apart() -> None:
    rows = [
        Answered("1", "not found", True, "field"), Answered("2", "2", True, "field"),
        Answered("not found", " not  found", False, "absent"), Answered("not found", "7", False, "absent"),
        Answered("not found", "", False, "absent"),
    ]  # fmt: skip
    found = score.not_found(rows)
    assert found["false"] == {"count": 2, "said": 1, "share": 0.5}
    assert found["invented"] == {"count": 3, "said": 2, "share": pytest.approx(2 / 3)}
    assert score.not_found(rows[:2])["invented"]["share"] is None


def test_calibration_error_is_the_gap_between_being_sure_and_being_right() -> None:
    rows = [Answered("1", "1" if i < 6 else "2", True, "number", 0.85) for i in range(10)]
    assert score.calibration_error(rows) == pytest.approx(0.25)
    rows += [Answered("1", "1", True, "number", 1.0) for _ in range(10)]
    assert score.calibration_error(rows) == pytest.approx(0.125)
    assert score.calibration_error([Answered("1", "1", True, "number")]) is None


def test_a_fitted_calibration_lowers_the_error(tmp_path) -> None:
    random = Random(0)
    means = [-random.expovariate(2.0) for _ in range(3000)]
    right = [random.random() < calibrated(mean, (5.0, 1.0)) for mean in means]
    slope, offset = calibrate.fit(means, right)
    assert slope == pytest.approx(5.0, rel=0.15)
    assert offset == pytest.approx(1.0, abs=0.25)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "fila"}')
    lines = [{"answer": "1", "predicted": "1" if hit else "2", "cut": True, "kind": "number",
              "token_probability": math.exp(mean)} for mean, hit in zip(means, right, strict=True)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert calibrate.main(["--model", str(folder), str(tmp_path / "a.jsonl")]) == 0
    numbers = json.loads((folder / "config.json").read_text())["answer_calibration"]
    assert numbers == [slope, offset]
    errors = [
        score.calibration_error(Answered("1", "1" if hit else "2", True, "n", sure(mean))
                                for mean, hit in zip(means, right, strict=True))
        for sure in (math.exp, lambda mean: calibrated(mean, numbers))
    ]  # fmt: skip
    assert errors[1] < 0.03 < errors[0]
    with pytest.raises(ValueError, match="one kind only"):
        calibrate.fit([0.0], [True])

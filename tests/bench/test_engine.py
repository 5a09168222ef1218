"""The engine: turns rotate, a red variant of ours ends a comparison, a failing baseline is a note, one CSV schema."""

from pathlib import Path

import pytest
import torch

from bench import engine, records
from bench.engine import Comparison, Contestant
from bench.verify import Verdict

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_turns_rotate_and_the_first_round_does_not_count():
    order: list[str] = []
    runners = {name: engine.Runner([lambda name=name: order.append(name)], CPU) for name in ("a", "b", "c")}
    order.clear()
    seconds = engine.in_turns(runners, rounds=1)
    assert order == ["b", "c", "a", "c", "a", "b"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 1, "b": 1, "c": 1}


def comparison(**results: float) -> Comparison:
    """Contestants that return numbers of which 0 is right; those named `ours...` are this package's."""

    def bind(value: float):
        def call() -> float:
            if value < 0:
                raise RuntimeError("no such kernel\nat all")
            return value

        return lambda index: call

    contestants = [Contestant(name, bind(value), ours=name.startswith("ours")) for name, value in results.items()]
    return Comparison(
        "cvfm", "w", "forward", "float32", contestants, lambda: lambda _, found: Verdict(found == 0, found, "too large")
    )


def test_a_red_variant_of_this_package_ends_the_comparison():
    with pytest.raises(engine.Red, match="cvfm, w, forward: nothing is timed: ours is red: too large"):
        engine.compare(comparison(base=0, ours=1), CPU, rounds=1)
    with pytest.raises(RuntimeError, match="no such kernel"):
        engine.compare(comparison(base=0, ours=-1), CPU, rounds=1)


def test_a_baseline_that_fails_or_is_red_is_left_out_with_a_note(tmp_path):
    asked = comparison(base=0, red=2, broken=-1, ours=0)
    results = engine.compare(asked, CPU, rounds=2)
    assert {name: len(result.seconds) for name, result in results.items()} == {
        "base": 2, "red": 0, "broken": 0, "ours": 2,
    }  # fmt: skip
    assert results["red"].note == "red: too large"
    assert results["broken"].note == "RuntimeError: no such kernel"
    path = tmp_path / "a.csv"
    records.append(path, records.rows_of(asked, results, CPU, "wall"))
    rows = {row["variant"]: row for row in records.read(path)}
    assert [rows[name]["p50_ms"] == "" for name in rows] == [False, True, True, False]


def test_kept_memory_counts_what_autograd_holds():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert engine.kept_for_backward(lambda: x @ weight, [x, weight]) == 0
    assert engine.kept_for_backward(lambda: (x @ weight).sin().sum(), [x, weight]) == 4 * 8 * 4


def test_records_keep_one_schema(tmp_path):
    with pytest.raises(ValueError, match="fieldnames: 'colour'"):
        records.append(tmp_path / "a.csv", [{"colour": "red"}])
    other = tmp_path / "b.csv"
    other.write_text("workload,speed\n")
    with pytest.raises(ValueError, match="got workload,speed"):
        records.append(other, [{"workload": "x"}])


def test_names_of_the_committed_files_are_read_as_today():
    committed = records.read(RESULTS / "cvfm_cpu.csv")
    assert {row["variant"] for row in committed} == {"tuned_eager", "native", "eager"}


def test_sources_without_git_have_a_digest_of_their_own(monkeypatch):
    records.commit.cache_clear()
    monkeypatch.setenv("FILA_BENCH_COMMIT", "named")
    assert records.commit() == "named"
    monkeypatch.delenv("FILA_BENCH_COMMIT")
    monkeypatch.setattr(records, "ROOT", Path("/nonexistent"))
    records.commit.cache_clear()
    assert records.commit().startswith("source-")
    records.commit.cache_clear()

"""The engine: turns rotate, a red variant of ours ends a comparison, a failing baseline is a note, one CSV schema."""

from pathlib import Path

import pytest
import torch

from bench import engine, goals, records, report
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


def test_where_all_are_left_out_nothing_is_timed():
    assert engine.in_turns({}, 3) == {}


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


def test_a_variant_of_this_package_that_is_wrong_or_fails_costs_the_others_nothing():
    for wrong, note in ((1, "red: too large"), (-1, "failed: RuntimeError: no such kernel")):
        told: list[str] = []
        results = engine.compare(comparison(base=0, ours=wrong, ours_too=0), CPU, 1, watch=told.append)
        assert {name: len(result.seconds) for name, result in results.items()} == {"base": 1, "ours": 0, "ours_too": 1}
        assert results["ours"].note == note
        assert told[:3] == ["base", "ours", "ours_too"], "whoever watches knows whose turn it is"
        assert "ours" not in told[3:]


def test_want_of_memory_is_no_failure():
    assert engine.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert engine.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not engine.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_pytest_benchmark_times_nothing_that_is_red():
    with pytest.raises(engine.Red, match="cvfm, w, forward: red: too large"):
        engine.run_benchmark(pytest.fail, comparison(ours=1), CPU)


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


def row(variant: str, session: str, milliseconds: float | str = 1.0, **columns: str) -> records.Row:
    question = {"operation": "cvfm", "workload": "768-stage4-bfloat16-b8", "direction": "forward"}
    return dict.fromkeys(records.COLUMNS, "") | question | {
        "variant": variant, "session": session, "p50_ms": str(milliseconds), "clock": "events", **columns,
    }  # fmt: skip


def test_times_of_two_sessions_are_never_divided():
    """The second session ran at half the clock: every ratio is of one session, the last that has both."""
    first = [row("tuned_eager", "1", 4.0), row("native", "1", 2.0), row("eager", "1", 1.0)]
    second = [row("tuned_eager", "2", 8.0), row("native", "2", 2.0), row("compile", "2", 4.0)]
    ratios = report.speed_ups([*first, *second], "cvfm", "forward")
    assert {name: list(of.values()) for name, of in ratios.items()} == {
        "native": [4.0],
        "eager": [4.0],
        "compile": [2.0],
    }
    measured = goals.Measured([*first, *second])
    assert measured.speed_up(768, "forward", goals.COMPILED, [4]) == 2.0
    assert measured.speed_up(768, "forward", goals.EAGER, [4]) == 4.0
    assert measured.speed_up(768, "forward", goals.EXPERT, [4]) is None
    alone = goals.Measured([row("compile", "3", 1.0), row("native", "4", 1.0)])
    assert alone.speed_up(768, "forward", goals.COMPILED, [4]) is None


def test_what_is_missing_is_measured_with_its_base():
    question = dict.fromkeys(records.QUESTION, "") | {
        "operation": "cvfm", "workload": "768-stage4-bfloat16-b8", "direction": "forward",
    }  # fmt: skip
    asked = ["tuned_eager", "native", "triton"]
    apart = [row("tuned_eager", "1"), row("native", "1"), row("triton", "2")]
    assert records.missing(apart, question, asked) == asked
    assert records.missing(apart, question, asked[:2]) == []
    hung = row("triton", "", "", note="hung: no end within 60 s")
    assert records.missing([hung], question, asked) == asked[:2]
    assert records.missing([*apart, hung], question, asked) == []
    assert records.missing(apart, question | {"table": "12345678"}, asked) == asked


def test_rows_are_added_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    records.append(path, [row("a", "1")])
    before = path.read_text()

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        records.append(path, [row("b", "1")])
    assert path.read_text() == before


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

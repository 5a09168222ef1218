"""The bench's runs: rounds and clocks, the CSV and its columns, resuming, settings, the command."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import measure, records, roofline, run, settings, timing, variants
from bench.cases import SUITES
from bench.memory import kept_for_backward
from fila_kernels import cvfm

ROOT = Path(__file__).resolve().parents[2]
TINY = SUITES["tiny"][0]


def test_a_red_variant_prints_no_ratio(tmp_path, monkeypatch, capsys):
    def wrong(**arguments):
        return cvfm(**{k: v for k, v in arguments.items() if k != "backend"}) * 1.1

    ours = variants.Variant("native", lambda: wrong, ours=True)
    monkeypatch.setitem(variants.REGISTRY, "native", ours)
    monkeypatch.setattr(measure, "roof_of", lambda *_: roofline.Roof(1e9, 1e9))
    path = tmp_path / "red.csv"
    options = settings.Settings(csv=str(path), variants="tuned_eager,torch")
    measurement = measure.Measurement(options, TINY, "forward")
    measurement.judge()
    assert measurement.red()
    measurement.prepare()
    assert set(measurement.runners) == {"tuned_eager"}
    measurement.record({"tuned_eager": [1e-3] * 3})
    text = run.table(records.read(path))
    assert "not timed: 64-stage1-float32-h16-d8-g2, forward, torch: red: out: error" in text
    assert "x m" not in text
    assert "geometric mean" in text


def test_a_run_writes_every_column_it_can_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "roof_of", lambda *_: roofline.Roof(1e9, 1e9))
    path = tmp_path / "rows.csv"
    options = settings.Settings(csv=str(path), variants="tuned_eager,native,native_recompute", resume=1)
    for _ in range(2):
        measurement = measure.Measurement(options, TINY, "forward+backward")
        if not measurement.variants:
            break
        measurement.judge()
        measurement.prepare()
        once = measurement.round()
        for _ in range(3):
            once()
        measurement.record(measurement.seconds)
    rows = {r["variant"]: r for r in records.read(path)}
    assert len(records.read(path)) == len(rows) == 3, "the second pass measured nothing again"
    empty = {"cuda", "table", "host_ms", "note"} | (set() if records.version("triton") else {"triton"})
    for found in rows.values():
        assert {name for name, value in found.items() if not value} == empty
        assert float(found["p20_ms"]) <= float(found["p50_ms"]) <= float(found["p80_ms"])
    kept = {name: int(r["kept_bytes"]) for name, r in rows.items()}
    assert kept["native_recompute"] == 0 < kept["native"] < kept["tuned_eager"]
    assert not measure.pending(options, TINY, "forward+backward")
    assert measure.pending(dataclasses.replace(options, resume=0), TINY, "forward+backward")


def test_kept_memory_counts_what_autograd_holds():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert kept_for_backward(lambda: x @ weight, [x, weight]) == 0
    assert kept_for_backward(lambda: (x @ weight).sin().sum(), [x, weight]) == 4 * 8 * 4


def test_records_keep_one_schema(tmp_path):
    path = tmp_path / "a.csv"
    records.append(path, {"case": "x", "p50_ms": "1"})
    with pytest.raises(ValueError, match=r"expected columns of bench\.records\.COLUMNS, got colour"):
        records.append(path, {"colour": "red"})
    other = tmp_path / "b.csv"
    other.write_text("case,speed\n")
    with pytest.raises(ValueError, match="got case,speed"):
        records.append(other, {"case": "x"})
    committed = records.read(ROOT / "bench/results/cvfm_cpu.csv")
    assert {r["operation"] for r in committed} == {"cvfm"}
    assert "geometric mean" in run.table(committed)


def test_sources_without_git_have_a_digest_of_their_own(monkeypatch):
    assert records.source_digest() == records.source_digest()
    monkeypatch.setenv("FILA_BENCH_COMMIT", "named")
    records.commit.cache_clear()
    assert records.commit() == "named"
    monkeypatch.delenv("FILA_BENCH_COMMIT")
    monkeypatch.setattr(records, "ROOT", Path("/nonexistent"))
    records.commit.cache_clear()
    assert records.commit().startswith("source-")
    records.commit.cache_clear()


def test_settings_go_through_the_environment(monkeypatch):
    for name in dataclasses.asdict(settings.Settings()):
        monkeypatch.setenv(settings.PREFIX + name.upper(), "")
        monkeypatch.delenv(settings.PREFIX + name.upper())
    written = settings.Settings(csv="a.csv", suite="tiny", rounds=3, clock="thread", deadline=1.5, resume=1)
    written.write()
    assert settings.Settings.read() == written
    assert written.time_is_up()
    monkeypatch.setenv("FILA_BENCH_CLOCK", "sun")
    with pytest.raises(ValueError, match="expected one of wall, thread, got 'sun'"):
        settings.Settings.read()


def test_interleaving_rotates_and_own_time_runs_for_own_variants_only():
    order: list[str] = []
    runners = {
        name: timing.Runner([lambda name=name: order.append(name)], torch.device("cpu")) for name in ("a", "b", "c")
    }
    order.clear()
    run_once = timing.interleaved(runners)
    assert set(run_once()) == {"a", "b", "c"}
    run_once()
    assert order == ["b", "c", "a", "c", "a", "b"]
    assert timing.num_sets(1, torch.device("cpu")) == 1


@pytest.fixture
def made_up_gpu(monkeypatch):
    """CUDA's events, streams and graphs over a clock that calls move by hand; returns the clock's advance."""
    clock = [0.0]
    captured: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return (end.time - self.time) * 1e3

    class Graph:
        def replay(self) -> None:
            clock[0] += captured[0]

    @contextlib.contextmanager
    def capture(graph: Graph, pool):
        start = clock[0]
        yield
        captured[:] = [clock[0] - start]

    class Stream:
        def __init__(self, device=None) -> None:
            pass

        def wait_stream(self, other: "Stream") -> None:
            pass

    def advance(seconds: float) -> None:
        clock[0] += seconds

    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": Stream, "synchronize": lambda _device: None,
        "current_stream": Stream, "stream": lambda _stream: contextlib.nullcontext(),
        "get_device_properties": lambda _device: SimpleNamespace(L2_cache_size=50 * 2**20),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return advance


def test_rounds_on_a_gpu_go_through_all_sets_and_last_long_enough(made_up_gpu):
    device = torch.device("cuda")
    assert timing.num_sets(100 * 2**20, device) == 4
    assert timing.num_sets(2**40, device) == 1
    assert timing.num_sets(1, device) == timing.MOST_SETS
    durations = (1e-4, 2e-4, 1e-4, 2e-4)
    calls = [lambda seconds=seconds: made_up_gpu(seconds) for seconds in durations]
    for runner in (timing.Runner(calls, device), timing.GraphRunner(calls, device)):
        assert runner.round() == pytest.approx(1.5e-4), "seconds a call, over the sets"
        assert runner.repeats == 3, "a pass is 0.6 ms, and a round two milliseconds or nearly"
        assert runner.first_seconds >= 0


@pytest.mark.slow
def test_the_command_measures_prints_and_stops_in_time(tmp_path):
    """`python -m bench.run` as users call it, in a process of its own."""
    path = tmp_path / "tiny.csv"
    command = [
        sys.executable,
        "-m",
        "bench.run",
        "--suite",
        "tiny",
        "--csv",
        str(path),
        "--rounds",
        "2",
        "-k",
        "stage4",
    ]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cases of tiny, 2 rounds" in done.stdout
    assert "without liger: " in done.stdout
    assert "geometric mean" in done.stdout
    assert {r["variant"] for r in records.read(path)} == {"tuned_eager", "native", "eager"}
    late = subprocess.run(
        [*command, "--resume", "--seconds", "1e-9"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert late.returncode == run.TIME_IS_UP, late.stdout
    assert "time is up" in late.stdout
    assert len(records.read(path)) == 5


@pytest.mark.slow
def test_extra_info_reaches_pytest_benchmark(tmp_path):
    """What `--benchmark-json` holds is this package's own time, so that two of them can be compared."""
    output = tmp_path / "b.json"
    variables = {"FILA_BENCH_SUITE": "tiny", "FILA_BENCH_CSV": str(tmp_path / "b.csv"), "FILA_BENCH_ROUNDS": "3"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_cvfm.py",
        "-q",
        "--benchmark-enable",
        "-k",
        "stage4 and not backward",
    ]
    done = subprocess.run(
        [*command, f"--benchmark-json={output}", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **variables}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (found,) = json.loads(output.read_text())["benchmarks"]
    own = [r for r in records.read(tmp_path / "b.csv") if r["variant"] == "native"]
    assert found["stats"]["median"] * 1e3 == pytest.approx(float(own[0]["p50_ms"]), rel=0.9)
    assert found["extra_info"]["native_ms"] == pytest.approx(float(own[0]["p50_ms"]), rel=1e-3)

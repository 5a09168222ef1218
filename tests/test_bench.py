"""The bench: its shapes, floors and gate, the CSV, resuming, the goals, the plots, and `make gpu` without a GPU."""

import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import baselines, goals, gpu, measure, plots, records, roofline, run, settings, timing, variants, verify
from bench.cases import SUITES, Case
from bench.crop_resize_baselines import grid_sample, scattered_backward
from bench.memory import kept_for_backward
from fila_kernels import crop_resize, cvfm, reference

ROOT = Path(__file__).resolve().parent.parent
TINY = SUITES["tiny"][0]
SMALL = [
    Case(256, 1, "float32", images=3, hidden_width=16, token_width=8, grid=4),  # scale 8
    Case(192, 2, "float32", images=2, hidden_width=16, token_width=8, grid=4),  # scale 3
    Case(96, 3, "float32", hidden_width=16, token_width=8, grid=4),  # enlarged
    Case(96, 1, "float32", hidden_width=16, token_width=8, grid=4, views=1, prefix=0),
]


def whole(case: Case) -> dict[str, torch.Tensor]:
    inputs = case.inputs()
    return inputs | {"boxes": baselines.rounded(inputs["boxes"])}


def row(**values) -> dict[str, str]:
    """A line of a CSV, read back."""
    start = {
        "device": "NVIDIA H200", "operation": "cvfm", "direction": "forward", "note": "", "clock": "events",
        "p50_ms": "1", "torch": "2.11.0", "commit": "abc",
    }  # fmt: skip
    return dict.fromkeys(records.COLUMNS, "") | start | {name: str(value) for name, value in values.items()}


def test_every_suite_has_named_cases_and_the_registry_holds_what_the_issue_asks():
    for name, cases in SUITES.items():
        assert len({case.name for case in cases}) == len(cases) > 0, name
    for images in (1, 8, 32):
        for hidden, suite in ((1024, f"images-{images}"), (4096, f"hidden-4096-images-{images}")):
            assert {(c.raster, c.stage) for c in SUITES[suite]} == {(r, s) for r in (768, 1536) for s in (1, 2, 3, 4)}
            assert all((c.images, c.hidden_width, c.dtype) == (images, hidden, "bfloat16") for c in SUITES[suite])
    assert [case.name for case in SUITES["frozen"]] == [
        "1536-stage1-bfloat16-b8-frozen", "1536-stage4-bfloat16-b8-frozen",
    ]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_baselines_compute_the_definition(case):
    inputs = whole(case)
    expected = reference.cvfm(**inputs, num_prefix_tokens=case.prefix)
    lists = inputs | {"boxes": inputs["boxes"].int().tolist(), "image_index": inputs["image_index"].tolist()}
    for function in (baselines.naive_eager, baselines.tuned_eager, baselines.library, variants.tapped_eager):
        found = function(**lists, num_prefix_tokens=case.prefix)
        assert (found - expected).abs().max() <= 1e-5, function.__name__
    arguments = (inputs["features"], inputs["boxes"], inputs["image_index"], case.grid)
    sampled = reference.crop_resize(*arguments)
    for resize in (grid_sample, baselines.sliced_resize, baselines.tapped_resize):
        assert (resize(*arguments) - sampled).abs().max() <= 1e-5, resize.__name__
    features = inputs["features"].requires_grad_()
    out = crop_resize(features, *arguments[1:])
    grad = torch.randn_like(out)
    scattered = scattered_backward(grad, arguments[1], arguments[2], tuple(features.shape[:3]))
    assert (scattered - torch.autograd.grad(out, features, grad)[0]).abs().max() <= 1e-5


def test_the_floor_takes_the_cheaper_way_and_counts_by_hand():
    case = Case(768, 4, "bfloat16", images=8)
    samples, cells = 8 * 5 * 576, 8 * 24 * 24
    forward = 2 * samples * 1024 * 2048 + 2 * cells * 1536 * 1024
    assert roofline.works(case, "forward")[0].flops == forward < case.flops()
    kept, again = roofline.works(case, "forward+backward")
    assert kept.flops == 3 * forward
    assert again.flops == 4 * forward
    assert kept.bytes - again.bytes == 2 * 2 * samples * 2048
    fast_memory, slow_memory = roofline.Roof(bytes=1e15, flops=1e12), roofline.Roof(bytes=1e9, flops=1e18)
    assert roofline.floor(case, "forward+backward", fast_memory) == kept
    assert roofline.floor(case, "forward+backward", slow_memory) == again
    frozen = dataclasses.replace(case, frozen=True)
    assert kept.flops - roofline.works(frozen, "forward+backward")[0].flops == 2 * cells * 1536 * 1024
    assert roofline.Work(10, 40).seconds(roofline.Roof(bytes=8, flops=5)) == 5
    roof = roofline.measure_roof(torch.float32, torch.device("cpu"), sizes=(2**16, 32), rounds=2)
    assert min(roof.bytes, roof.flops) > 0


@pytest.mark.parametrize("broken", ["", "out", *TINY.wanted])
def test_the_gate_lets_the_definition_through_and_nothing_else(broken):
    """A fault of one part in a hundred in the result or any one gradient turns it red."""
    inputs = whole(TINY)
    grad = None if broken == "out" else torch.randn_like(inputs["tokens"])
    gate = verify.Gate(TINY, inputs, grad)
    call = verify.step(cvfm, inputs, TINY.wanted, grad)

    def faulty():
        found = call()
        if grad is None:
            return found * 1.01
        return [g * 1.01 if name == broken else g for name, g in zip(TINY.wanted, found, strict=True)]

    verdict = gate(faulty)
    assert verdict.green == (broken == "")
    if broken:
        assert verdict.worst.startswith(f"{broken}: error")
        assert verdict.error > 10


def test_nan_and_wrong_shapes_are_red():
    inputs = whole(TINY)
    gate = verify.Gate(TINY, inputs, None)
    out = cvfm(**inputs)
    assert not gate(lambda: out * float("nan")).green
    assert not gate(lambda: out[:1]).green
    assert not gate(lambda: out.double()).green


def test_a_red_variant_prints_no_ratio(tmp_path, monkeypatch, capsys):
    def wrong(**arguments):
        return cvfm(**{k: v for k, v in arguments.items() if k != "backend"}) * 1.1

    ours = variants.Variant("torch", lambda: wrong, ours=True)
    monkeypatch.setitem(variants.REGISTRY, "torch", ours)
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
    options = settings.Settings(csv=str(path), variants="tuned_eager,torch,torch_recompute", resume=1)
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
    empty = {"cuda", "host_ms", "note"} | (set() if records.version("triton") else {"triton"})
    for found in rows.values():
        assert {name for name, value in found.items() if not value} == empty
        assert float(found["p20_ms"]) <= float(found["p50_ms"]) <= float(found["p80_ms"])
    kept = {name: int(r["kept_bytes"]) for name, r in rows.items()}
    assert kept["torch_recompute"] == 0 < kept["torch"] < kept["tuned_eager"]
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


def test_absent_variants_have_reasons():
    cpu = torch.device("cpu")
    found, missing = variants.select(cpu, variants.REGISTRY)
    assert {v.name for v in found} >= {"naive_eager", "tuned_eager", "tapped_eager", "compile", "library", "torch"}
    assert "torch_single_pass" in missing
    assert "CUDA" in missing["tuned_eager_graph"]
    assert all(missing.values())
    assert "liger" in variants.select(cpu)[1]
    with pytest.raises(ValueError, match=r"expected some of .* got fast"):
        variants.select(cpu, ["fast"])


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
    assert {r["variant"] for r in records.read(path)} == {"tuned_eager", "torch"}
    late = subprocess.run(
        [*command, "--resume", "--seconds", "1e-9"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert late.returncode == run.TIME_IS_UP, late.stdout
    assert "time is up" in late.stdout
    assert len(records.read(path)) == 4


def gpu_rows() -> list[dict[str, str]]:
    """A made-up GPU on which everything of this package takes half of eager's and four fifths of compile's time."""
    rows = []
    roof = {"roof_flops": 1e12, "roof_bytes": 1e12, "floor_flops": 1e8, "floor_bytes": 4e8}
    for images in (1, 8, 32):
        for raster in (768, 1536):
            for stage in (1, 2, 3, 4):
                for direction in ("forward", "forward+backward"):
                    common = roof | {"case": goals.case(raster, stage, images), "direction": direction}
                    kept = {"kept_bytes": 100} if direction != "forward" else {}
                    rows += [
                        row(**common, variant="tuned_eager", p50_ms=1.0, **kept),
                        row(**common, variant="compile", p50_ms=0.9),
                        row(**common, variant="compile_tapped", p50_ms=0.625),
                        row(
                            **common,
                            variant="triton",
                            p50_ms=0.5,
                            host_ms=0.04,
                            error=1.05,
                            **(kept and {"kept_bytes": 30}),
                        ),
                        row(**common, variant="triton_graph", p50_ms=0.03),
                        row(**common, variant="triton_recompute", p50_ms=0.6, **(kept and {"kept_bytes": 0})),
                    ]
    common = roof | {"operation": "crop_resize", "direction": "backward", "case": goals.case(768, 1, 8)}
    rows += [row(**common, variant="triton", p50_ms=0.5), row(**common, variant="scattered", p50_ms=0.4)]
    return rows


def test_goals_are_read_off_the_rows_and_missing_ones_say_so():
    assert {line[3] for line in goals.lines([])} == {"not measured"}
    found = [line[3] for line in goals.lines(gpu_rows())]
    assert found == [
        "2.00x / 1.25x", "2.00x / 1.25x", "1.25x", "2.00x / 2.00x", "2.00x", "0.80 / 0.80", "not measured", "30 us",
        "80%", "0.30 / 0.00", "40 us", "1.05x", "+25%",
    ]  # fmt: skip
    partly = [r for r in gpu_rows() if "compile" not in r["variant"]]
    assert goals.lines(partly)[0][3] == "2.00x / not measured"
    untimed = [r | {"p50_ms": "", "note": "red"} if r["variant"] == "triton" else r for r in gpu_rows()]
    assert goals.lines(untimed)[4][3] == "not measured"


def test_plots_are_made_from_csv_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "made_up.csv"
    for line in gpu_rows():
        records.append(path, line)
    assert plots.main([str(path), "--out", str(tmp_path / "plots")]) == 0
    drawn = {file.name for file in (tmp_path / "plots").iterdir()}
    assert drawn == {
        "made_up_cvfm_forward.png", "made_up_cvfm_forward_backward.png",
        "made_up_roofline_forward.png", "made_up_roofline_forward_backward.png",
    }  # fmt: skip
    ratios = plots.speed_ups(records.read(path), "cvfm", "forward")
    assert set(ratios["triton"].values()) == {2.0}
    assert plots.points(records.read(path), "forward")["triton"][0] == (0.25, 2e11)
    assert plots.main([str(tmp_path / "none.csv")]) == 1


def test_gpu_sections_stay_within_the_limits(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for section in gpu.SECTIONS:
        assert section.limit <= 240
        assert f"{section.name:<16}" in listed
    assert gpu.SECTIONS[0].gate, "correctness comes before speed"
    assert len(gpu.FILES) <= 8
    suites = {s for section in gpu.SECTIONS for part in section.command for s in part.split(",") if s in SUITES}
    assert suites == set(SUITES) - {"cpu", "tiny"}, "every suite of real shapes has its section"


def test_gpu_dry_run_names_commands_that_parse(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.SECTIONS)
    assert not list(tmp_path.iterdir())
    for line in lines:
        assert " -m " in line
        assert "{" not in line
    assert gpu.main(["--dry-run", "--only", "bench-8"]) == 0
    only = capsys.readouterr().out
    assert [line.split(":")[0] for line in only.splitlines()] == ["correctness", "bench-8"]
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "bench-9"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == gpu.NO_GPU == 2
    assert len(done.stderr.splitlines()) == 1
    assert "sees no CUDA device; nothing was run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tuned_table_comes_back_from_the_results(tmp_path):
    out, table = tmp_path / "out", tmp_path / "tables" / "gpu.json"
    out.mkdir()
    gpu.restore_table(out, table)
    assert not table.exists()
    (out / "gpu.json").write_text("saved")
    gpu.restore_table(out, table)
    assert table.read_text() == "saved"
    (out / "gpu.json").write_text("older")
    gpu.restore_table(out, table)
    assert table.read_text() == "saved", "what the package has is not overwritten"


def section(name: str, code: str, limit: int = 100, gate: bool = False) -> gpu.Section:
    return gpu.Section(name, limit, ("-c", code), gate, "")


def test_sections_resume_stop_in_time_and_stop_at_red(tmp_path, capsys):
    good = section("good", "print('{out}'); print('fine')")
    late = section("late", f"raise SystemExit({gpu.UNFINISHED})")
    bad = section("bad", "raise SystemExit(1)")
    slow = section("slow", "import time; print('begun', flush=True); time.sleep(60)")
    assert gpu.run_all([good, late], tmp_path, 0, "c1", "gpu") == gpu.UNFINISHED
    states = {s["section"]: s for s in gpu.read_states(tmp_path)}
    assert states["good"]["status"] == "done"
    assert states["good"]["last_line"] == "fine"
    assert states["late"]["status"] == "unfinished"
    capsys.readouterr()
    assert gpu.run_all([good], tmp_path, 0, "c1", "gpu") == 0
    assert "good: done before" in capsys.readouterr().out
    assert gpu.run_all([good], tmp_path, 0, "c2", "gpu") == 0
    assert "done before" not in capsys.readouterr().out, "another commit is measured anew"
    assert gpu.run_all([dataclasses.replace(bad, gate=True), good], tmp_path, 0, "c3", "gpu") == 1
    assert "is not green, so nothing is timed" in capsys.readouterr().out
    assert gpu.run_all([bad, good], tmp_path, 0, "c4", "gpu") == 1
    assert "good: done" in capsys.readouterr().out
    status, last = gpu.run_section(slow, tmp_path, 2.0)
    assert status == "unfinished"
    assert last == "stopped after 2 s: begun"
    assert gpu.run_all([slow], tmp_path, 10, "c5", "gpu") == gpu.UNFINISHED
    assert "slow: no time left" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"sections.csv", "log.txt"}
    with (tmp_path / "sections.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == gpu.FIELDS


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
    own = [r for r in records.read(tmp_path / "b.csv") if r["variant"] == "torch"]
    assert found["stats"]["median"] * 1e3 == pytest.approx(float(own[0]["p50_ms"]), rel=0.9)
    assert found["extra_info"]["torch_ms"] == pytest.approx(float(own[0]["p50_ms"]), rel=1e-3)

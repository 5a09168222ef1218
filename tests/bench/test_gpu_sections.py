"""What a GPU is wanted for, without one: the goals read off made-up rows, the plots, the sections of `make gpu`."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import build_native, goals, gpu, plots, records, sanitize, tune
from bench.cases import SUITES
from bench.variants import REGISTRY
from fila_kernels import dispatch, tuned
from fila_kernels.backends.triton import configs

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_compiled_ahead_is_what_is_timed():
    """Triton compiles a kernel anew where a size becomes 1 or a multiple of 16."""
    for suite in ("images-1", "images-8", "images-32"):
        for case in SUITES[suite]:
            ahead = dataclasses.replace(case, images=min(case.images, tune.SHARED_IMAGES))
            for sizes in zip(tune.shape_of(case), tune.shape_of(ahead), strict=True):
                assert len({(size == 1, size % 16 == 0) for size in sizes}) == 1, (case.name, sizes)
            rows = [c.tiles * (c.prefix + c.grid**2) % 16 == 0 for c in (case, ahead)]
            assert rows[0] == rows[1], case.name


def test_narrow_widths_and_float32_are_measured_on_a_gpu():
    commands = {each.name: each.command for each in gpu.SECTIONS}
    asked = set(commands["narrow"][commands["narrow"].index("--variants") + 1].split(","))
    assert {"triton", "triton_single_pass", "triton_sample_first", "native", "tuned_eager", "library"} <= asked
    assert asked <= set(REGISTRY)
    assert all(max(c.token_width, c.hidden_width) <= configs.TRITON_SINGLE_PASS_WIDTH for c in SUITES["narrow"])
    assert {case.dtype for case in SUITES["float32"]} == {"float32"}
    assert "float32" in commands["float32"]


BEFORE = ["build", "correctness-matrix", "correctness-plans", "correctness-native"]


def row(**values) -> dict[str, str]:
    """A line of a CSV, read back."""
    start = {
        "device": "NVIDIA H200", "operation": "cvfm", "direction": "forward", "note": "", "clock": "events",
        "p50_ms": "1", "torch": "2.11.0", "commit": "abc",
    }  # fmt: skip
    return dict.fromkeys(records.COLUMNS, "") | start | {name: str(value) for name, value in values.items()}


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
        "80%", "0.30 / 0.00", "+20%", "40 us", "1.05x", "+25%",
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
        "made_up_cvfm_forward.svg", "made_up_cvfm_forward_backward.svg",
        "made_up_roofline_forward.svg", "made_up_roofline_forward_backward.svg",
    }  # fmt: skip
    ratios = plots.speed_ups(records.read(path), "cvfm", "forward")
    assert set(ratios["triton"].values()) == {2.0}
    assert plots.points(records.read(path), "forward")["triton", "bfloat16"][0] == (0.25, 2e11)
    assert plots.main([str(tmp_path / "none.csv"), "--out", str(tmp_path / "none")]) == 1
    assert {plots.source(tmp_path / "plots" / name) for name in drawn} == {plots.digest(path)}
    records.append(path, gpu_rows()[0])
    assert plots.source(tmp_path / "plots" / min(drawn)) != plots.digest(path), "a picture shows that it is out of date"


def test_the_documents_pictures_are_of_the_committed_csv():
    pictures = sorted((ROOT / "docs" / "plots").glob("*.svg"))
    assert pictures
    for picture in pictures:
        name, *_ = (plots.source(picture) or "").split()
        assert plots.source(picture) == plots.digest(ROOT / "bench" / "results" / name), "run tools/documents.py"


def test_gpu_sections_stay_within_the_limits(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for section in gpu.SECTIONS:
        assert section.limit <= 240
        assert f"{section.name:<20}" in listed
    gates = [section.gate for section in gpu.SECTIONS]
    assert gates == [False, True, True, True] + [False] * (len(gates) - 4), "correctness comes before speed"
    assert gpu.SECTIONS[0].name == "build"
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
    assert [line.split(":")[0] for line in only.splitlines()] == [*BEFORE, "tune-8", "bench-8"]
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
    assert gpu.run_all([dataclasses.replace(good, always=True)], tmp_path, 0, "c1", "gpu") == 0
    assert "done before" not in capsys.readouterr().out, "what is built may be gone from this machine"
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


def test_what_reads_a_table_waits_until_it_is_tuned(tmp_path, capsys):
    late = section("tune", f"raise SystemExit({gpu.UNFINISHED})")
    timed = dataclasses.replace(section("bench", "print('timed')"), needs=("tune",))
    assert gpu.run_all([late, timed], tmp_path, 0, "c1", "gpu") == gpu.UNFINISHED
    assert "bench: skipped: tune is not done" in capsys.readouterr().out
    assert [s["status"] for s in gpu.read_states(tmp_path)] == ["unfinished", "unfinished"]
    assert "timed" not in (tmp_path / "log.txt").read_text()
    tuned = section("tune", "print('tuned')")
    assert gpu.run_all([tuned, timed], tmp_path, 0, "c1", "gpu") == 0
    assert [(s["section"], s["last_line"]) for s in gpu.read_states(tmp_path)] == [
        ("tune", "tuned"),
        ("bench", "timed"),
    ]
    assert gpu.run_all([timed], tmp_path, 0, "c2", "gpu") == gpu.UNFINISHED, "tuned at another commit"
    names = [s.name for s in gpu.SECTIONS]
    for each in gpu.SECTIONS:
        assert all(names.index(need) < names.index(each.name) for need in each.needs)
        assert each.needs or not each.name.startswith("bench-")


def test_another_table_or_triton_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    cpu = torch.device("cpu")
    start = row() | records.environment(cpu)
    assert start["table"] == ""
    (tmp_path / "cpu.json").write_text("half")
    half = row() | records.environment(cpu)
    (tmp_path / "cpu.json").write_text("whole")
    whole = row() | records.environment(cpu)
    done = records.done([start, half])
    assert records.key(half) in done
    assert records.key(whole) not in done
    assert records.key(half | {"triton": "0.0"}) not in done


def test_a_gate_that_ran_out_of_time_is_unfinished_and_green_ones_are_not_run_again(tmp_path, monkeypatch, capsys):
    green = section("green", "print('green')", gate=True)
    slow = section("slow", "import time; time.sleep(60)", limit=2, gate=True)
    timed = section("timed", "print('timed')")
    monkeypatch.setattr(gpu, "MARGIN", 0)
    assert gpu.run_all([green, slow, timed], tmp_path, 0, "c1", "gpu") == gpu.UNFINISHED
    assert gpu.run_all([green, slow, timed], tmp_path, 1.0, "c1", "gpu") == gpu.UNFINISHED
    assert "green: done before" in capsys.readouterr().out
    assert "timed" not in {s["section"] for s in gpu.read_states(tmp_path)}


def test_the_correctness_sections_share_the_gpu_tests_without_gap_or_repetition():
    matrix, plans, native = (each.command for each in gpu.SECTIONS if each.gate)
    file = "tests/kernels/test_gpu.py"
    assert "def test_matrix(" in (ROOT / file).read_text()
    assert matrix[2:5] == (file, "-k", "test_matrix")
    assert plans[2:5] == (file, "-k", "not test_matrix")
    assert native[2:4] == ("tests/kernels", f"--ignore={file}")
    assert matrix[5:] == plans[5:] == native[4:]
    assert native[4:6] == ("-m", "gpu")


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "8.0"), ((8, 9), "8.9"), ((9, 0), "9.0a"), ((10, 0), "10.0a"), ((12, 0), "12.0")]
)
def test_the_build_names_this_gpus_architecture(monkeypatch, capability, name):
    calls = []

    def call(command, cwd, env, check):
        calls.append(env)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build_native, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(subprocess, "run", call)
    assert build_native.main() == 1, "a failing compiler is not hidden"
    assert calls[0]["TORCH_CUDA_ARCH_LIST"] == name
    assert calls[0]["FILA_KERNELS_BUILD_CUDA"] == "1"


def test_without_its_tools_the_build_and_the_sanitizers_are_skipped_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(build_native, "missing", lambda: "nvcc was not found")
    assert build_native.main() == os.EX_UNAVAILABLE
    assert capsys.readouterr().out == "skipped: nvcc was not found\n"
    monkeypatch.setattr(sys, "argv", ["bench.sanitize", "memcheck"])
    monkeypatch.setattr(dispatch, "available", lambda name: (False, "no CUDA device"))
    assert sanitize.main() == os.EX_UNAVAILABLE
    monkeypatch.setattr(dispatch, "available", lambda name: (True, ""))
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert sanitize.main() == os.EX_UNAVAILABLE
    assert capsys.readouterr().out == "skipped: no CUDA device\nskipped: compute-sanitizer was not found\n"


def test_what_was_skipped_is_tried_again_and_told_at_the_end(tmp_path, capsys):
    """A missing tool ends nothing, but is not done either: it may be there the next time."""
    without = section("build", f"print('skipped: no nvcc'); raise SystemExit({os.EX_UNAVAILABLE})")
    timed = section("timed", "print('fine')")
    for _ in range(2):
        assert gpu.run_all([without, dataclasses.replace(without, name="memcheck"), timed], tmp_path, 0, "c", "g") == 0
        told = capsys.readouterr().out
        assert "build: skipped after" in told
        assert told.splitlines()[-1] == "cuda backend: not exercised (no nvcc)"
        assert {s["section"]: s["status"] for s in gpu.read_states(tmp_path)} == {
            "build": "skipped", "memcheck": "skipped", "timed": "done",
        }  # fmt: skip
    assert gpu.run_all([section("build", "print('built')"), timed], tmp_path, 0, "c", "g") == 0
    assert "not exercised" not in capsys.readouterr().out


def test_sanitizers_look_at_our_kernels_and_fail_loudly(monkeypatch):
    commands = []

    def call(command, cwd, env, check):
        commands.append(command)
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1", "a tensor has an allocation of its own"
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(dispatch, "available", lambda name: (True, ""))
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(subprocess, "run", call)
    for tool in sanitize.TOOLS:
        monkeypatch.setattr(sys, "argv", ["bench.sanitize", tool])
        assert sanitize.main() == 1
    assert all("--error-exitcode" in command for command in commands)
    assert ["kernel_substring=fila" in command for command in commands] == [True, True, False]

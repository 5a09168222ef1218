"""Every command of bench/ and of `make gpu` runs, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import goals, records, report, run, tune
from bench.workloads import SUITES
from tools import build_cuda, compute_sanitizer, gpu

ROOT = Path(__file__).resolve().parents[2]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("operation", ["cvfm", "crop_resize", "tower"])
def test_run_measures_prints_and_resumes(operation, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    command = ["--operation", operation, "--suite", "tiny", "--device", "cpu", "--rounds", "2", "--csv", str(path)]
    assert run.main(command) == 0
    assert "geometric mean" in capsys.readouterr().out
    rows = records.read(path)
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]), row
    assert {row["variant"].removeprefix("fusion_") for row in rows} >= {report.BASES[operation].removeprefix("fusion_")}
    assert run.main([*command, "--resume"]) == 0
    assert records.read(path) == rows, "nothing was measured again"


def test_run_stops_in_time_and_names_what_it_does_not_know(tmp_path, capsys):
    late = ["--suite", "tiny", "--device", "cpu", "--csv", str(tmp_path / "a.csv"), "--seconds", "1e-9"]
    assert run.main(late) == run.TIME_IS_UP
    assert not (tmp_path / "a.csv").exists()
    for unknown in (["--suite", "fast"], ["--variants", "fast"]):
        with pytest.raises(SystemExit):
            run.main(unknown)
        assert "fast" in capsys.readouterr().err


@pytest.mark.slow
def test_pytest_benchmark_times_a_version_and_compares_another_with_it(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/bench_crop_resize.py", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "-k", "768-stage4-bfloat16 and forward", f"--benchmark-storage={tmp_path}"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    for more in ("--benchmark-save=before", "--benchmark-compare"):
        done = subprocess.run([*command, more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.rglob("*_before.json")
    names = {found["params"]["backend"] for found in json.loads(saved.read_text())["benchmarks"]}
    assert "eager" in names
    assert "(0001_before)" in done.stdout


def test_report_prints_and_draws_the_committed_results(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = ROOT / "bench" / "results" / "cvfm_cpu.csv"
    assert report.main([str(file), "--plots", str(tmp_path)]) == 0
    assert "geometric mean" in capsys.readouterr().out
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == [
        "cvfm_cpu_cvfm_forward.svg", "cvfm_cpu_cvfm_forward_backward.svg",
        "cvfm_cpu_roofline_forward.svg", "cvfm_cpu_roofline_forward_backward.svg",
    ]  # fmt: skip
    assert {report.source(tmp_path / name) for name in drawn} == {report.digest(file)}
    assert report.main([str(tmp_path / "none.csv")]) == 1
    assert {line[3] for line in goals.lines([])} == {goals.NOT_MEASURED}
    assert goals.lines(records.read(file))[0][3] == goals.NOT_MEASURED, "a CPU's rows are no GPU's"


def test_the_documents_pictures_are_of_the_committed_results():
    pictures = sorted((ROOT / "docs" / "plots").glob("*.svg"))
    assert pictures
    for picture in pictures:
        name, *_ = (report.source(picture) or "").split()
        assert report.source(picture) == report.digest(ROOT / "bench" / "results" / name), "run tools/documents.py"


def test_gpu_lists_its_sections_and_their_commands(tmp_path, capsys):
    assert gpu.main(["--list"]) == 0
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    for line in capsys.readouterr().out.splitlines()[-len(gpu.SECTIONS) :]:
        name, _, command = line.partition(": ")
        words = command.split()
        module = words[words.index("-m") + 1]
        assert "{" not in command, name
        if module == "bench.run":
            run.parse([word for word in words[words.index("bench.run") + 1 :] if word != "cuda" and word != "--device"])
        else:
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), name
    assert not (tmp_path / "out").exists()
    suites = {s for section in gpu.SECTIONS for part in section.command for s in part.split(",") if s in SUITES}
    assert suites == set(SUITES) - {"cpu", "tiny"}, "every suite of real shapes has its section"


@needs_no_gpu
def test_without_a_gpu_the_gpus_commands_say_so(monkeypatch, capsys):
    assert gpu.main([]) == gpu.NO_GPU
    assert tune.main([]) == gpu.NO_GPU
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("no CUDA device" in line for line in said)
    monkeypatch.setattr(sys, "argv", ["compute_sanitizer", "memcheck"])
    assert compute_sanitizer.main() == os.EX_UNAVAILABLE
    monkeypatch.setattr(build_cuda.cuda_units, "missing_tool", lambda disassemble: "nvcc was not found")
    assert build_cuda.main() == os.EX_UNAVAILABLE
    assert capsys.readouterr().out.endswith("skipped: nvcc was not found\n")


def section(name: str, code: str, **settings) -> gpu.Section:
    return gpu.Section(name, ("-c", code), "", **settings)


def test_sections_are_done_once_wait_for_each_other_and_stop_at_red(tmp_path, capsys):
    good = section("good", "print('{out}'); print('fine')")
    late = section("late", f"raise SystemExit({gpu.UNFINISHED})")
    after = section("after", "print('ran')", needs=("late",))
    assert gpu.run_all([good, late, after], tmp_path, 0, "c1", "gpu") == gpu.UNFINISHED
    states = {state["section"]: (state["status"], state["last_line"]) for state in gpu.read_states(tmp_path)}
    assert states == {
        "good": ("done", "fine"), "late": ("unfinished", ""), "after": ("unfinished", "waits for late"),
    }  # fmt: skip
    capsys.readouterr()
    assert gpu.run_all([good], tmp_path, 0, "c1", "gpu") == 0
    assert "done before" in capsys.readouterr().out
    assert gpu.run_all([good], tmp_path, 0, "c2", "gpu") == 0
    assert "done before" not in capsys.readouterr().out, "another commit is measured anew"
    red = section("red", "raise SystemExit(1)", gate=True)
    assert gpu.run_all([red, good], tmp_path, 0, "c3", "gpu") == 1
    assert "red is not green, so nothing is timed" in capsys.readouterr().out
    slow = section("slow", "import time; print('begun', flush=True); time.sleep(60)")
    assert gpu.run_section(slow, tmp_path, 2.0) == ("unfinished", "stopped after 2 s: begun")

"""Every command of bench/ runs, small; what needs a GPU says so."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import goals, records, report, run, tune
from tools import build_cuda, compute_sanitizer
from tools.gpu import __main__ as gpu

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


@needs_no_gpu
def test_without_a_gpu_the_gpus_commands_say_so(monkeypatch, capsys):
    assert gpu.main([]) == gpu.NO_GPU
    assert tune.main([]) == gpu.NO_GPU
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("no CUDA device" in line for line in said)
    monkeypatch.setattr(sys, "argv", ["compute_sanitizer", "memcheck"])
    assert compute_sanitizer.main() == os.EX_UNAVAILABLE
    assert build_cuda.main([]) == os.EX_UNAVAILABLE
    assert capsys.readouterr().out.endswith("skipped: no CUDA device\n")


def test_without_headers_the_native_library_is_skipped_with_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build_cuda, "runs_here", lambda: False)
    monkeypatch.setattr(build_cuda, "TRAVEL", tmp_path)
    monkeypatch.setattr(build_cuda.cuda_units, "missing_tool", lambda disassemble: "CUTLASS was not found")
    assert build_cuda.main(["--out", str(tmp_path)]) == os.EX_UNAVAILABLE
    said = capsys.readouterr().out
    assert "pip download --no-deps -d runs/travel nvidia-cutlass" in said
    assert said.endswith("skipped: CUTLASS was not found\n"), "the section's last line gives the reason"


def test_headers_of_a_wheel_that_travelled_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr(build_cuda, "TRAVEL", tmp_path)
    assert build_cuda.headers(tmp_path) == {}
    with zipfile.ZipFile(tmp_path / "nvidia_cutlass-4.2.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("cutlass_library/source/include/cutlass/cutlass.h", "// here")
        wheel.writestr("cutlass_library/source/tools/none.h", "")
    found = Path(build_cuda.headers(tmp_path)["CUTLASS_PATH"])
    assert (found / "include" / "cutlass" / "cutlass.h").read_text() == "// here"
    assert not (found / "tools").exists()

"""Planner, resolver and report: which way is taken, and why."""

import json
import re

import pytest
import torch
from cases import Case

from fila_kernels import crop_resize, cvfm, dispatch, explain, info, native, planner
from fila_kernels.call import Shape

SHAPE = Shape(5, 1, 24, 1024, 1024, 1536, 1, 24, 24)


def test_default_and_reason(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    name, reason = dispatch.resolve()
    assert name == "torch"
    assert "default" in reason
    assert dispatch.resolve("auto")[0] == "torch"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "reference")
    assert dispatch.resolve() == ("reference", "set by FILA_KERNELS_BACKEND")
    assert dispatch.resolve("torch")[0] == "torch"
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"expected one of reference, torch, triton, cuda.*got 'fast' \(set by"):
        dispatch.resolve()


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("triton", "its kernels run on CUDA tensors, these are on cpu"),
        ("cuda", "no CUDA kernels|its kernels run on CUDA tensors, these are on cpu"),
    ],
)
def test_an_explicit_backend_that_cannot_run_raises_with_the_reason(backend, reason):
    inputs = Case("dispatch").inputs(torch.float32)
    with pytest.raises(RuntimeError, match=f"'{backend}' .requested by the caller. cannot run: ({reason})"):
        cvfm(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="cannot run"):
        crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 2, backend=backend)


def test_single_pass_says_whose_it_is():
    inputs = Case("dispatch").inputs(torch.float32)
    with pytest.raises(RuntimeError, match="plan 'single_pass' cannot run on backend 'torch'"):
        cvfm(**inputs, plan="single_pass")


def test_who_may_use_triton(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "torch")):
        monkeypatch.setattr(dispatch, "_capability", lambda index, found=capability: found)
        assert dispatch.resolve(device=cuda, dtype=torch.bfloat16)[0] == name
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    name, reason = dispatch.resolve(device=cuda, dtype=torch.float64)
    assert name == "torch"
    assert "default, since triton cannot run: its kernels compute in float32 and take no float64" in reason
    assert dispatch.resolve(device=cpu, dtype=torch.float32)[0] == "torch"
    with pytest.raises(RuntimeError, match="take no float64"):
        dispatch.resolve("triton", device=cuda, dtype=torch.float64)
    assert dispatch.resolve("triton", "single_pass", cuda, torch.bfloat16, (512, 256))[0] == "triton"
    with pytest.raises(RuntimeError, match="widths of at most 512, which stay on chip, got 1024"):
        dispatch.resolve("triton", "single_pass", cuda, torch.bfloat16, (512, 1024))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert dispatch.resolve(device=cuda, dtype=torch.bfloat16)[0] == "torch"
    with pytest.raises(RuntimeError, match="not installed"):
        dispatch.resolve("triton", device=cuda, dtype=torch.bfloat16)


CUDA_BUILD = native.Build(("8.0", "9.0a", "10.0a+PTX"), "13.0.88", "")


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_gpus_run_compiled_code(architecture, runs, does_not):
    build = native.Build((architecture,), "13.0", "")
    assert [build.runs_on(capability) for capability in runs] == [True] * len(runs)
    assert [build.runs_on(capability) for capability in does_not] == [False] * len(does_not)


def test_who_may_use_cuda(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    reasons = {
        native.Build((), "", "nvcc was not found"): "no CUDA kernels in the native library: nvcc was not found",
        CUDA_BUILD: "no CUDA device for the CUDA kernels for 8.0, 9.0a, 10.0a.PTX, compiled by nvcc 13.0.88",
    }
    monkeypatch.setattr(native, "load", lambda: (False, "not built: no C++ compiler was found"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA kernels: the native library is not built: no C"):
        dispatch.resolve("cuda", device=cuda)
    for build, reason in reasons.items():
        monkeypatch.setattr(native, "build", lambda found=build: found)
        with pytest.raises(RuntimeError, match=reason):
            dispatch.resolve("cuda", device=cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="run on CUDA tensors, these are on cpu"):
        dispatch.resolve("cuda", device=cpu)
    with pytest.raises(RuntimeError, match="take no float64"):
        dispatch.resolve("cuda", device=cuda, dtype=torch.float64)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(dispatch, "_capability", lambda index, found=capability: found)
        assert dispatch.resolve("cuda", device=cuda, dtype=torch.bfloat16)[0] == "cuda"
        assert dispatch.resolve(device=cuda, dtype=torch.bfloat16)[0] == "triton"
    monkeypatch.setattr(dispatch, "_capability", lambda index: (12, 0))
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 12\.0; TORCH_CUDA_ARCH_LIST"):
        dispatch.resolve("cuda", device=cuda, dtype=torch.bfloat16)


def test_what_the_library_says_is_constant_where_torch_compile_traces(monkeypatch):
    monkeypatch.setattr(native, "build", lambda: CUDA_BUILD)

    def chosen(x):
        compiled, reason = dispatch._cuda_kernels()
        usable = compiled and dispatch._cuda_runs_on(9, 0) and not dispatch._cuda_runs_on(7, 5)
        return x + (len(reason) if usable and dispatch._cuda_has_single_pass() else 0)

    traced = torch.compile(chosen, fullgraph=True, backend="eager")
    assert traced(torch.zeros(1)).item() == len(native.describe_cuda()) > 0


def test_single_pass_in_cuda_is_for_one_width_and_capability(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(native, "build", lambda: CUDA_BUILD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    wide = (1024, 1024)
    assert dispatch.resolve("cuda", "single_pass", cuda, torch.bfloat16, wide)[0] == "cuda"
    with pytest.raises(RuntimeError, match="expected token and hidden widths of 1024, got 1024 and 512"):
        dispatch.resolve("cuda", "single_pass", cuda, torch.bfloat16, (1024, 512))
    with pytest.raises(RuntimeError, match=r"multiplies bfloat16 and float16, got torch\.float32"):
        dispatch.resolve("cuda", "single_pass", cuda, torch.float32, wide)
    monkeypatch.setattr(native, "build", lambda: native.Build(("9.0",), "13.0", ""))
    with pytest.raises(RuntimeError, match=r"compiled as 9\.0a"):
        dispatch.resolve("cuda", "single_pass", cuda, torch.bfloat16, wide)
    monkeypatch.setattr(native, "build", lambda: CUDA_BUILD)
    monkeypatch.setattr(dispatch, "_capability", lambda index: (8, 0))
    with pytest.raises(RuntimeError, match=r"for compute capability 9\.0"):
        dispatch.resolve("cuda", "single_pass", cuda, torch.bfloat16, wide)


def test_backends_agree():
    inputs = Case("dispatch").inputs()
    torch.testing.assert_close(cvfm(**inputs, backend="torch"), cvfm(**inputs, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_planner_projects_small_maps_and_samples_large_ones(dtype):
    cpu = torch.device("cpu")
    small = planner.choose(SHAPE, dtype, cpu)
    large = planner.choose(SHAPE._replace(feature_width=192, height=384, width=384), dtype, cpu)
    assert (small.forward, small.weight_gradient, small.feature_gradient) == ("project_first",) * 3
    assert (large.forward, large.weight_gradient, large.feature_gradient) == ("sample_first",) * 3
    assert all("ms" in why for why in (*small.reasons.values(), *large.reasons.values()))


def test_a_requested_plan_is_taken_everywhere():
    plan = planner.choose(SHAPE, torch.float32, torch.device("cpu"), "sample_first")
    assert plan.forward == plan.weight_gradient == plan.feature_gradient == "sample_first"
    assert set(plan.reasons.values()) == {"requested by the caller"}


def test_explain_names_every_direction():
    found = explain((5, 577, 1024), (1, 24, 24, 1536), dtype=torch.bfloat16)
    assert set(found) == {"backend", "forward", "weight_gradient", "feature_gradient"}
    assert all(entry["choice"] and entry["why"] for entry in found.values())
    assert explain((5, 577, 1024), (1, 24, 24, 1536), backend="reference")["forward"]["choice"] == "reference"


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [
        (torch.float32, "cpu", "compiled CPU operators"),
        (torch.float16, "cpu", "PyTorch calls: .* not torch.float16"),
        (torch.float32, "cuda", "PyTorch calls: .* not on cuda"),
    ],
)
def test_explain_says_who_crops_and_resizes(dtype, device, words):
    if words.startswith("compiled") and not native.load()[0]:
        words = "PyTorch calls: the native library is not built"
    why = explain((5, 577, 1024), (1, 24, 24, 1536), dtype=dtype, device=device, backend="torch")["backend"]["why"]
    assert re.search(f"crop and resize: {words}", why)


def test_info_prints_for_people_and_machines(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "reference", "triton", "cuda", "native", "project_first", "sample_first"):
        assert word in text
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["triton"]["available"] is dispatch.available("triton")[0]
    assert report["backend"]["choice"] in dispatch.BACKENDS


def test_info_survives_a_backend_that_cannot_be_had(monkeypatch, capsys):
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "cuda")
    assert info.main([]) == 0
    assert "cannot run" in capsys.readouterr().out

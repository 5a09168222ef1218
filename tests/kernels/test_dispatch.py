"""Planner, resolver and report: the plan and backend that are chosen, and the reason given."""

import json

import pytest
import torch

from fila_kernels import crop_resize, cvfm, dispatch, explain, info, planner
from fila_kernels.backends.native import library
from fila_kernels.backends.triton import configs
from fila_kernels.call import Shape
from fila_kernels.testing import Case

SHAPE = Shape(5, 1, 24, 1024, 1024, 1536, 1, 24, 24)


LIBRARY_LOADED = library.load()[0]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def on_gpu(monkeypatch, capability, build=None):
    """A machine with a GPU, Triton, and a native library with these CUDA kernels."""
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(library, "load", lambda: (build is not None, "for a test"))
    monkeypatch.setattr(library, "build", lambda: build)


def test_default_and_reason():
    name, reason = dispatch.resolve()
    assert name == ("native" if LIBRARY_LOADED else "eager")
    assert reason.startswith("default; ")
    assert dispatch.resolve("auto") == (name, reason)


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "reference")
    assert dispatch.resolve() == ("reference", "set by FILA_KERNELS_BACKEND")
    assert dispatch.resolve("eager") == ("eager", "requested by the caller")
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"expected one of reference, eager, native, triton.*got 'fast' \(set by"):
        dispatch.resolve()


@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float32, "its kernels run on CUDA tensors, these are on cpu"),
        ("native", torch.float16, "its CPU kernels take float32, bfloat16 and float64|the native library is not built"),
    ],
)
def test_an_explicit_backend_that_cannot_run_raises_with_the_reason(backend, dtype, reason, tiles):
    inputs = Case("dispatch", tiles=tiles).inputs(dtype)
    with pytest.raises(RuntimeError, match=f"'{backend}' .requested by the caller. cannot run: ({reason})"):
        cvfm(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="cannot run"):
        crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 2, backend=backend)


def test_single_pass_says_whose_it_is():
    inputs = Case("dispatch").inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"no backend can run this.*not 'eager': plan 'single_pass': it is one"):
        cvfm(**inputs, plan="single_pass")
    with pytest.raises(RuntimeError, match=r"backend 'eager' .requested.* cannot run: plan 'single_pass'"):
        cvfm(**inputs, plan="single_pass", backend="eager")


def test_candidates_are_in_the_order_in_which_they_are_tried(monkeypatch):
    on_gpu(monkeypatch, (9, 0), CUDA_BUILD)
    low, wide = torch.bfloat16, (1024, 1024)
    assert dispatch.candidates(CUDA, low).names == ("triton", "native", "eager")
    assert dispatch.candidates(CUDA, torch.float64).names == ("eager",)
    assert dispatch.candidates(CUDA, low, "single_pass", (512, 512)).names == ("triton",)
    assert dispatch.candidates(CUDA, low, "single_pass", wide).names == ("native",)
    assert dispatch.resolve(None, "single_pass", CUDA, low, wide)[0] == "native"
    assert dispatch.candidates(CPU, torch.float32).names == ("native", "eager")
    found = dispatch.candidates(CPU, torch.float16)
    assert found.names == ("eager",)
    assert set(found.reasons) == set(dispatch.BACKENDS)
    assert "not torch.float16" in found.reasons["native"]
    assert "these are on cpu" in found.reasons["triton"]
    for device in (CUDA, CPU):
        for dtype in (low, torch.float64, torch.float16):
            name, why = dispatch.resolve(None, None, device, dtype)
            names, reasons = dispatch.candidates(device, dtype)
            assert name == names[0]
            assert reasons[name] in why


def test_a_gpu_without_tiles_of_its_own_says_whose_it_falls_back_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, path in (((12, 0), "8.x"), ((12, 1), "8.x"), ((11, 0), "10.0"), ((13, 0), "8.x")):
        on_gpu(monkeypatch, capability)
        told = f"{capability[0]}.{capability[1]} has no tiles of its own and falls back to those of {path}"
        assert dispatch.backend_report()["triton"]["reason"].endswith(told), "python -m fila_kernels.info prints it"
        limits = configs.Device("a GPU", capability, 100, 101_376)
        assert limits.copies_tiles == (path == "10.0")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)):
        on_gpu(monkeypatch, capability)
        assert "falls back" not in str(dispatch.backend_report()["triton"]["reason"])


def test_who_may_use_triton(monkeypatch):
    for capability, name in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "eager")):
        on_gpu(monkeypatch, capability)
        assert dispatch.resolve(device=CUDA, dtype=torch.bfloat16)[0] == name
    on_gpu(monkeypatch, (9, 0))
    name, reason = dispatch.resolve(device=CUDA, dtype=torch.float64)
    assert name == "eager"
    assert "not 'triton': its kernels compute in float32 and take no float64" in reason
    with pytest.raises(RuntimeError, match="take no float64"):
        dispatch.resolve("triton", device=CUDA, dtype=torch.float64)
    assert dispatch.resolve("triton", "single_pass", CUDA, torch.bfloat16, (512, 256))[0] == "triton"
    with pytest.raises(RuntimeError, match="widths of at most 512, which stay on chip, got 1024"):
        dispatch.resolve("triton", "single_pass", CUDA, torch.bfloat16, (512, 1024))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert dispatch.resolve(device=CUDA, dtype=torch.bfloat16)[0] == "eager"
    with pytest.raises(RuntimeError, match="not installed"):
        dispatch.resolve("triton", device=CUDA, dtype=torch.bfloat16)


CUDA_BUILD = library.Build(("8.0", "9.0a", "10.0a+PTX"), "13.0.88", "")


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
    build = library.Build((architecture,), "13.0", "")
    assert [build.runs_on(capability) for capability in runs] == [True] * len(runs)
    assert [build.runs_on(capability) for capability in does_not] == [False] * len(does_not)


def test_who_may_use_native_on_a_gpu(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (False, "not built: no C++ compiler was found"))
    with pytest.raises(RuntimeError, match="the native library is not built: no C"):
        dispatch.resolve("native", device=CUDA)
    on_gpu(monkeypatch, (9, 0), library.Build((), "", "nvcc was not found"))
    with pytest.raises(RuntimeError, match="no CUDA kernels in the native library: nvcc was not found"):
        dispatch.resolve("native", device=CUDA)
    on_gpu(monkeypatch, (9, 0), CUDA_BUILD)
    with pytest.raises(RuntimeError, match="take no float64"):
        dispatch.resolve("native", device=CUDA, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="run on CPU and CUDA tensors, these are on mps"):
        dispatch.resolve("native", device=torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no CUDA device for the CUDA kernels for 8\.0, 9\.0a, 10\.0a.PTX"):
        dispatch.resolve("native", device=CUDA)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        on_gpu(monkeypatch, capability, CUDA_BUILD)
        assert dispatch.resolve("native", device=CUDA, dtype=torch.bfloat16)[0] == "native"
        assert dispatch.resolve(device=CUDA, dtype=torch.bfloat16)[0] == "triton"
    on_gpu(monkeypatch, (12, 0), CUDA_BUILD)
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 12\.0; TORCH_CUDA_ARCH_LIST"):
        dispatch.resolve("native", device=CUDA, dtype=torch.bfloat16)


def test_single_pass_of_native_is_for_one_width_and_capability(monkeypatch):
    on_gpu(monkeypatch, (9, 0), CUDA_BUILD)
    wide = (1024, 1024)
    assert dispatch.resolve("native", "single_pass", CUDA, torch.bfloat16, wide)[0] == "native"
    with pytest.raises(RuntimeError, match="expected token and hidden widths of 1024, got 1024 and 512"):
        dispatch.resolve("native", "single_pass", CUDA, torch.bfloat16, (1024, 512))
    with pytest.raises(RuntimeError, match=r"multiplies bfloat16 and float16, got torch\.float32"):
        dispatch.resolve("native", "single_pass", CUDA, torch.float32, wide)
    on_gpu(monkeypatch, (9, 0), library.Build(("9.0",), "13.0", ""))
    with pytest.raises(RuntimeError, match=r"compiled as 9\.0a"):
        dispatch.resolve("native", "single_pass", CUDA, torch.bfloat16, wide)
    on_gpu(monkeypatch, (8, 0), CUDA_BUILD)
    with pytest.raises(RuntimeError, match=r"for compute capability 9\.0"):
        dispatch.resolve("native", "single_pass", CUDA, torch.bfloat16, wide)


def test_backends_agree():
    inputs = Case("dispatch").inputs()
    expected = cvfm(**inputs, backend="reference")
    for name in dispatch.candidates(CPU, torch.float64).names:
        torch.testing.assert_close(cvfm(**inputs, backend=name), expected)


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


def test_both_passes_of_a_plan_name_their_backend():
    for name in dispatch.candidates(CPU, torch.float32).names:
        plan = planner.choose(SHAPE, torch.float32, CPU, None, name)
        assert (plan.forward_backend, plan.backward_backend) == (name, name)


def test_info_prints_for_people_and_machines(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for word in ("eager", "reference", "triton", "cuda", "native", "project_first", "sample_first"):
        assert word in text
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["triton"]["available"] is dispatch.available("triton")[0]
    assert report["backend"]["choice"] in dispatch.BACKENDS


def test_info_survives_a_backend_that_cannot_be_had(monkeypatch, capsys):
    monkeypatch.setenv("FILA_KERNELS_BACKEND", "triton")
    assert info.main([]) == 0
    assert "cannot run" in capsys.readouterr().out

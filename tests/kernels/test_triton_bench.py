"""The tuner and the products' benchmark over interpreted kernels: the steps of a GPU run, at small sizes."""

import dataclasses
import json

import pytest
import torch

from bench import bench_gemm, engine, tune
from bench.files import UnderWay
from bench.workloads import SUITES, Workload
from fila_kernels import reference, tuned
from fila_kernels.backends.triton import configs
from fila_kernels.call import DIRECTIONS

CPU = torch.device("cpu")
SMALL = Workload(64, 1, "float32", hidden_width=32, token_width=16, grid=2)


def tuner(path, kernels, **settings) -> tune.Tuner:
    return tune.Tuner(CPU, [path], kernels, most=2, rounds=1, **settings)


@pytest.mark.parametrize("part", bench_gemm.DIRECTIONS)
def test_the_products_are_those_that_are_defined(part):
    comparison = bench_gemm.comparison(SMALL, part, CPU, ["cublas", "unfused", "triton"])
    results = engine.judge(comparison, CPU)
    assert results["triton"].error is not None
    assert not any(result.note for result in results.values())
    plain, *_ = comparison.contestants
    assert not comparison.gate()(plain, plain.bind(0)()).green, "the plain product has no epilogue"


def test_a_table_is_written_that_launchers_and_planner_read(tmp_path, monkeypatch):
    path = tmp_path / "interpreter.json"
    first = tuner(path, ["crop_resize", "fc2"])
    first.tune_configs(SMALL, "sample_first")
    first.tune_plan(SMALL)
    entries = json.loads(path.read_text())
    assert [(e["kernel"], e["problem"]) for e in entries["configs"]] == [
        ("crop_resize", [SMALL.samples, SMALL.channels, 0]),
        ("fc2", [SMALL.rows, SMALL.token_width, SMALL.hidden_width]),
    ]
    for entry in entries["configs"]:
        config = configs.config_from(entry["kernel"], entry["config"])
        problem = configs.Problem(entry["kernel"], *entry["problem"], torch.float32)
        assert configs.supports(config, problem, configs.INTERPRETER)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.load.cache_clear()
    table = tuned.load("interpreter")
    tuned.load.cache_clear()
    fc2 = entries["configs"][1]
    assert table.configs(torch.float32).nearest("fc2", fc2["problem"]) == (fc2["config"], True)
    chosen, exact = table.plan(SMALL.shape, torch.float32)
    assert exact
    assert set(chosen) == set(DIRECTIONS)
    again = tuner(path, ["crop_resize", "fc2"])
    again.fastest = pytest.fail
    again.tune_configs(SMALL, "sample_first")
    again.tune_plan(SMALL)
    assert json.loads(path.read_text()) == entries, "what the table holds is not measured again"


def test_what_is_wrong_is_not_timed_and_not_tried_again(tmp_path, monkeypatch):
    factor = {"now": 1.0}
    monkeypatch.setattr(tune, "cvfm", lambda **arguments: factor["now"] * reference.cvfm(**without_choice(arguments)))
    settings = {"right": lambda: factor.update(now=1.0), "wrong": lambda: factor.update(now=1.01)}
    path, of = tmp_path / "table.json", {"kernel": "fc2"}
    trial = tune.Trial({"configs": []}, "float32")
    first = tuner(path, ["fc2"])
    assert first.fastest(trial, settings, SMALL, None, False, "wrong", of) == "right"
    (refused,) = json.loads(path.read_text())["refused"]
    assert (refused["kernel"], refused["setting"]) == ("fc2", "wrong")
    assert refused["reason"].startswith("out: error")
    monkeypatch.delitem(settings, "right")
    settings["wrong"] = pytest.fail
    assert tuner(path, ["fc2"]).fastest(trial, settings, SMALL, None, False, "wrong", of) is None


def without_choice(arguments):
    return {name: value for name, value in arguments.items() if name not in ("plan", "backend")}


def test_a_trial_that_ended_a_process_is_not_tried_again(tmp_path):
    under_way = UnderWay(tmp_path / "step.json")
    under_way.begin("fc2", {"kernel": "fc2", "setting": "large"}, 60)
    under_way.blame("hung: no end within 60 s")
    found = tuner(tmp_path / "table.json", ["fc2"], under_way=under_way)
    assert found.refused({"kernel": "fc2", "setting": "large"})
    assert not found.refused({"kernel": "fc2", "setting": "small"})


def test_each_kernel_is_compiled_by_one_process_alone():
    """Sizes that compile alike share a kernel; every kernel has one process, whatever the order of the launches."""

    class Kernel:
        def __init__(self, name):
            self.fn = lambda: None
            self.fn.__name__ = name

    rows = torch.empty(64)
    launches = [
        (Kernel(name), (rows, size), {"num_warps": warps})
        for name in ("fc1", "fc2") for size in (577, 2885, 32, 1) for warps in (4, 8)
    ]  # fmt: skip
    compiled: dict[int, list] = {share: [] for share in range(3)}
    for share, found in compiled.items():

        def run(self, *arguments, grid, warmup, found=found, **settings):
            assert warmup, "nothing is launched"
            found.append((self.fn.__name__, arguments[1], settings["num_warps"]))

        stand_in = tune.compiling(run, share, 3)
        for kernel, arguments, settings in launches:
            stand_in(kernel, *arguments, grid=(1,), warmup=False, **settings)
    everything = [launch for found in compiled.values() for launch in found]
    assert sorted(everything) == sorted((n, s, w) for n in ("fc1", "fc2") for s in (577, 32, 1) for w in (4, 8))


def test_nothing_is_begun_after_the_deadline(tmp_path):
    tuner(tmp_path / "late.json", configs.KERNELS, deadline=0.0).tune(SMALL)
    assert not (tmp_path / "late.json").exists()


def test_a_shortlist_begins_with_the_default_and_spreads_over_the_rest():
    problem = configs.Problem("weight_gradient", 1024, 1024, 23080, torch.bfloat16)
    device = configs.ARCHITECTURES[90]
    every = configs.candidates(problem, device)
    short = tune.shortlist(problem, device, 12)
    assert short[0] == configs.default(problem, device)
    assert len(short) == len(set(short)) == 12 < len(every)
    assert short[:6] == every[:6]
    assert every.index(short[-1]) > 0.8 * len(every)
    assert tune.shortlist(problem, device, len(every)) == every


def test_what_is_compiled_ahead_is_what_is_timed():
    """Triton compiles a kernel anew where a size becomes 1 or a multiple of 16."""
    for timed in SUITES["images-32"]:
        ahead = dataclasses.replace(timed, images=tune.SHARED_IMAGES)
        for sizes in zip((*timed.shape, timed.rows), (*ahead.shape, ahead.rows), strict=True):
            assert len({(size == 1, size % 16 == 0) for size in sizes}) == 1, sizes

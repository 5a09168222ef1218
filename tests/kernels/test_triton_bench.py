"""The tuner and the products' benchmark over interpreted kernels: the steps of a GPU run, at small sizes."""

import dataclasses
import json

import pytest
import torch

from bench import bench_gemm, engine, tune
from bench.workloads import SUITES, Workload
from fila_kernels import tuned
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

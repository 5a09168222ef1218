"""The tuner and the products' benchmark over interpreted kernels: the steps of a GPU run, at small sizes."""

import json

import pytest
import torch

from bench import bench_gemm, contest, tune
from bench.cases import Case
from fila_kernels import tuned
from fila_kernels.backends.triton import configs
from fila_kernels.call import DIRECTIONS

CPU = torch.device("cpu")
CASE = Case(64, 1, "float32", hidden_width=32, token_width=16, grid=2)


def tuner(path, kernels, deadline=float("inf")) -> tune.Tuner:
    return tune.Tuner(CPU, [path], kernels, most=2, rounds=1, deadline=deadline)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_the_products_are_those_that_are_defined(part):
    operands = bench_gemm.Operands(CASE, CASE.inputs())
    ways = bench_gemm.ways([operands], part)
    exact = bench_gemm.defined(operands, part, torch.float64)[:, CASE.prefix :]
    eager = ways["torch"](0)()[:, CASE.prefix :]
    green, error = contest.judge(ways["triton"](0)()[:, CASE.prefix :].clone(), eager, exact)
    assert green, error
    plain = ways["cublas"](0)()
    width = CASE.hidden_width if part == "fc1" else CASE.token_width
    assert plain.shape == (CASE.tiles, CASE.prefix + CASE.grid**2, width)
    assert not contest.judge(plain[:, CASE.prefix :], eager, exact)[0], "the plain product has no epilogue"


def test_a_table_is_written_that_launchers_and_planner_read(tmp_path, monkeypatch):
    path = tmp_path / "interpreter.json"
    first = tuner(path, ["crop_resize", "fc2"])
    first.tune_configs(CASE, "sample_first")
    first.tune_plans(CASE)
    entries = json.loads(path.read_text())
    rows = CASE.tiles * (CASE.prefix + CASE.grid**2)
    assert [(e["kernel"], e["problem"]) for e in entries["configs"]] == [
        ("crop_resize", [CASE.samples, CASE.channels, 0]),
        ("fc2", [rows, CASE.token_width, CASE.hidden_width]),
    ]
    for entry in entries["configs"]:
        config = configs.config_from(entry["kernel"], entry["config"])
        problem = configs.Problem(entry["kernel"], *entry["problem"], torch.float32)
        assert configs.supports(config, problem, configs.INTERPRETER)
        assert config in tune.shortlist(problem, configs.INTERPRETER, 2)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.load.cache_clear()
    table = tuned.load("interpreter")
    assert len(table) == 3
    fc2 = entries["configs"][1]
    assert table.configs(torch.float32).nearest("fc2", fc2["problem"]) == (fc2["config"], True)
    chosen, exact = table.plan(tune.shape_of(CASE), torch.float32)
    tuned.load.cache_clear()
    assert exact
    assert set(chosen) == set(DIRECTIONS)
    again = tuner(path, ["crop_resize", "fc2"])
    again.tune_problem = pytest.fail
    again.tune_configs(CASE, "sample_first")
    again.tune_plans(CASE)
    assert json.loads(path.read_text()) == entries, "what the table holds is not measured again"


def test_nothing_is_begun_after_the_deadline(tmp_path):
    late = tuner(tmp_path / "late.json", configs.KERNELS, deadline=0.0)
    late.tune(CASE)
    assert not (tmp_path / "late.json").exists()
    assert not late.trial.tried


def test_the_default_stays_unless_something_is_clearly_faster(tmp_path):
    found = tuner(tmp_path / "t.json", configs.KERNELS)
    found.rounds = 3

    class Fixed:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def round(self) -> float:
            return self.seconds

    assert found.fastest({"default": Fixed(1.0), "other": Fixed(0.999)}, "default") == "default"
    assert found.fastest({"default": Fixed(1.0), "other": Fixed(0.9)}, "default") == "other"
    assert found.fastest({"other": Fixed(2.0), "third": Fixed(1.0)}, "default") == "third"


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

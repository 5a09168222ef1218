"""Tuned tables: the entry that stands for a problem, and the behaviour without one."""

import json
import warnings

import pytest
import torch

from fila_kernels import cvfm, dispatch, planner, tuned
from fila_kernels.backends.triton import configs
from fila_kernels.call import DIRECTIONS, Shape
from fila_kernels.testing import Case

SHAPE = Shape(5, 1, 24, 1024, 1024, 1536, 1, 24, 24)


def config(rows):
    return configs.plain(configs.GemmConfig(rows, 128, 32, 8, 4))


ENTRIES = {
    "schema": tuned.SCHEMA,
    "device": "Test GPU 1",
    "plans": [
        {"shape": SHAPE._asdict(), "dtype": "bfloat16"}
        | dict.fromkeys(DIRECTIONS, "project_first")
        | {"feature_gradient": "sample_first"}
    ],
    "configs": [
        {"kernel": "fc2", "problem": [2885, 1024, 1024], "dtype": "bfloat16", "config": config(64)},
        {"kernel": "fc2", "problem": [5770, 1024, 1024], "dtype": "bfloat16", "config": config(128)},
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.load.cache_clear()
    monkeypatch.setattr(dispatch, "available", lambda *of: (True, "for a test"))
    yield tmp_path
    tuned.load.cache_clear()


def test_names_of_files():
    assert tuned.path_of("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"


def test_nearest_entry_within_a_factor_of_two():
    table = tuned.Table(ENTRIES)
    bf16 = torch.bfloat16
    plans, exact = table.plan(SHAPE, bf16)
    assert exact
    assert plans["forward"] == "project_first"
    assert not table.plan(SHAPE._replace(tiles=8), bf16)[1]
    assert table.plan(SHAPE._replace(tiles=11), bf16) is None
    assert table.plan(SHAPE._replace(prefix=0), bf16) is None
    assert table.plan(SHAPE, torch.float16) is None
    measured = table.configs(bf16)
    assert measured.nearest("fc2", (2885, 1024, 1024)) == (config(64), True)
    assert measured.nearest("fc2", (4400, 1024, 1024)) == (config(128), False)
    assert measured.nearest("fc2", (20_000, 1024, 1024)) is None
    assert measured.nearest("fc1", (2885, 1024, 1024)) is None
    assert table.configs(torch.float16).nearest("fc2", (2885, 1024, 1024)) is None
    assert not len(tuned.Table())


def test_planner_takes_the_table_for_triton_alone(folder, monkeypatch):
    tuned.path_of("Test GPU 1").write_text(json.dumps(ENTRIES))
    monkeypatch.setattr(planner, "_device_name", lambda device: "Test GPU 1")
    device = torch.device("cuda", 0)
    plan = planner.choose(SHAPE, torch.bfloat16, device, None, "triton")
    assert (plan.forward, plan.weight_gradient, plan.feature_gradient) == (
        "project_first", "project_first", "sample_first",
    )  # fmt: skip
    assert plan.reasons["forward"] == "tuned table of Test GPU 1: measured"
    near = planner.choose(SHAPE._replace(tiles=6), torch.bfloat16, device, None, "triton")
    assert near.reasons["forward"].endswith("nearest entry")
    far = planner.choose(SHAPE._replace(tiles=640), torch.bfloat16, device, None, "triton")
    assert far.reasons["forward"].startswith("cost model")
    eager = planner.choose(SHAPE, torch.bfloat16, device, None, "eager")
    assert eager.reasons["forward"].startswith("cost model")
    assert plan.configs.nearest("fc2", (2885, 1024, 1024)) == (config(64), True)
    assert not len(eager.configs)
    requested = planner.choose(SHAPE, torch.bfloat16, device, "sample_first", "triton")
    assert set(requested.reasons.values()) == {"requested by the caller"}
    narrow = SHAPE._replace(token_width=512, hidden_width=512)
    single = planner.choose(narrow, torch.bfloat16, device, "single_pass", "triton")
    assert (single.forward, single.weight_gradient, single.feature_gradient) == (
        "single_pass", "sample_first", "sample_first",
    )  # fmt: skip


def test_a_single_pass_that_was_measured_is_not_taken_where_it_cannot_run(folder, monkeypatch):
    """An entry stands for widths up to twice its own; the single pass ends at 512."""
    narrow = SHAPE._replace(token_width=512, hidden_width=512)
    plans = {"shape": narrow._asdict(), "dtype": "bfloat16"} | dict.fromkeys(DIRECTIONS, "sample_first")
    entries = ENTRIES | {"plans": [plans | {"forward": "single_pass"}]}
    tuned.path_of("Test GPU 1").write_text(json.dumps(entries))
    monkeypatch.setattr(planner, "_device_name", lambda device: "Test GPU 1")
    device = torch.device("cuda", 0)
    assert planner.choose(narrow, torch.bfloat16, device, None, "triton").forward == "single_pass"
    for wide in (SHAPE, narrow._replace(hidden_width=1024), narrow._replace(token_width=520)):
        assert planner.choose(wide, torch.bfloat16, device, None, "triton").forward != "single_pass"


def test_sizes_are_read_by_name():
    shape = dict(sorted(SHAPE._asdict().items()))
    assert tuple(shape.values()) != SHAPE
    table = tuned.Table(ENTRIES | {"plans": [ENTRIES["plans"][0] | {"shape": shape}]})
    assert table.plan(SHAPE, torch.bfloat16)[1]


@pytest.mark.parametrize(
    "text",
    ["{", '{"schema": 99}', "[]", '{"schema": 1, "plans": [{}]}',
     json.dumps({"schema": 1, "plans": [{"shape": {"tiles": 1}, "dtype": "bfloat16"}]})],
)  # fmt: skip
def test_a_table_that_cannot_be_used_warns_once_and_counts_as_none(folder, text):
    tuned.path_of("broken").write_text(text)
    with pytest.warns(UserWarning, match=r"broken.json is not used"):
        assert not len(tuned.load("broken"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not len(tuned.load("broken"))
        assert not len(tuned.load("never tuned"))


def test_a_config_of_another_version_warns_and_is_not_used():
    with pytest.warns(UserWarning, match="config of fc2 is not used: .*unroll"):
        assert configs.config_from("fc2", config(64) | {"unroll": 2}) is None


def test_tables_that_are_shipped_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        entries = json.loads(path.read_text())
        assert tuned.path_of(entries["device"]) == path
        assert len(tuned.Table(entries))


def test_cpu_tensors_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cvfm(**Case("quiet").inputs(torch.float32))

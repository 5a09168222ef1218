"""Tiles of two blocks of rows (128 + 64 on a GPU), interpreted: fc1 and fc2 of every plan, and what they save."""

import pytest
import torch
from interpreter import ALIGNED, guards  # noqa: F401
from test_triton_cvfm import check

from fila_kernels.backends.triton import configs


@pytest.fixture(params=[(32, 16, 1), (64, 32, 2)], ids=str)
def tail(request, monkeypatch) -> configs.GemmConfig:
    """fc1 and fc2 by such tiles: of 54 rows the last one has some in its first block, or the only one some in both."""
    block_m, tail_m, split = request.param
    tailed = configs.GemmConfig(
        block_m, 64, 64, 4, 2, tma=True, persistent=split > 1, split_epilogue=split, tail_m=tail_m
    )
    default, taken = configs.default, []

    def choose(problem, device):
        if problem.kernel not in configs.TAILED:
            return default(problem, device)
        assert configs.supports(tailed, problem, device)
        taken.append(problem.kernel)
        return tailed

    monkeypatch.setattr(configs, "default", choose)
    yield tailed
    assert "fc2" in taken


@pytest.mark.usefixtures("guards", "tail")
@pytest.mark.parametrize(("plan", "gate"), [("sample_first", "product"), ("project_first", "scale")])
def test_output_and_every_gradient(plan, gate):
    check(ALIGNED, torch.float32, gate, plan=plan)


@pytest.mark.usefixtures("guards", "tail")
def test_float16():
    check(ALIGNED, torch.float16, "product", plan="sample_first")

"""The checks themselves: each planted fault, of a kind that kernels have had, must be found."""

import importlib.util
import sys
from pathlib import Path

import pytest
import test_triton_crop_resize
import test_triton_cvfm
import torch
from interpreter import Guards, guards  # noqa: F401

from fila_kernels.backends.triton import crop_resize, epilogue, gemm, pointwise
from fila_kernels.testing import Case

CASE = Case("fault", tiles=2, images=1, prefix=2, boxes="overlapping")


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Replaces a file's jit functions by those of a copy with one expression changed."""

    def plant(module, old: str, new: str) -> None:
        source = Path(module.__file__).read_text()
        assert old in source, f"{module.__name__} has no {old!r} any more"
        path = tmp_path / "planted.py"
        path.write_text(source.replace(old, new))
        specification = importlib.util.spec_from_file_location("planted", path)
        changed = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "planted", changed)
        specification.loader.exec_module(changed)
        for name, function in vars(changed).items():
            if getattr(getattr(function, "fn", None), "__module__", "") == "planted":
                monkeypatch.setattr(module, name, function)

    return plant


def test_nothing_planted(guards):  # noqa: F811
    test_triton_crop_resize.check(CASE, torch.float32)
    test_triton_cvfm.check(CASE, torch.float32, "product")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=written)", "mask=written & (row != 3)[:, None])"),  # an unwritten row
        ("upper_tap(left, weight_x).to(tl.int64) * stride_w", "left.to(tl.int64) * stride_w"),  # a wrong tap
        ("tile.to(tl.int64) * stride_out_t +", "0 * stride_out_t +"),  # all tiles in one place
        ("tl.where(is_lower, 1.0 - weight, weight)", "tl.where(is_lower, weight, 1.0 - weight)"),  # weights swapped
        ("range(most_x)", "range(most_x - 1)"),  # a sample forgotten
    ],
)
def test_crop_resize(planted, guards, old, new):  # noqa: F811
    planted(crop_resize, old, new)
    with pytest.raises(AssertionError, match="error"):
        test_triton_crop_resize.check(CASE, torch.float32)
    guards.storages.clear()  # a fault may have hit them too


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (epilogue, "tl.store(p_rows, x.to", "tl.store(p_rows + extent.num_columns, x.to"),  # one row too far
        (epilogue, "tl.where(is_patch[:, None], passed, 0.0)", "passed"),  # prefix fused
        (epilogue, "grad = acc * slope", "grad = acc"),  # no slope
        (epilogue, "total = tl.where(is_patch, grad + acc, grad)", "total = acc"),  # the residual lost
        (epilogue, "channel = column - args.token_columns", "channel = column"),  # dS in the place of dX
        (pointwise, "branch_grad = alpha * slope", "branch_grad = slope"),  # the chain rule cut short
        (gemm, "(i_split + 1) * each, steps)", "(i_split + 1) * each - 1, steps)"),  # a step of the sum forgotten
        (gemm, "i_m, i_col + half, alpha", "i_m, i_col, alpha"),  # both groups of columns in one place
        (gemm, "if a_2 is not None:", "if False:"),  # the second operand left out
    ],
)
def test_cvfm(planted, guards, module, old, new):  # noqa: F811
    planted(module, old, new)
    with pytest.raises(AssertionError, match="error"):
        test_triton_cvfm.check(CASE, torch.float32, "product")
    guards.storages.clear()


def test_a_write_beyond_the_buffer(planted):
    """The guards see what no comparison can."""
    planted(
        crop_resize, "mask=written)", "mask=(row < num_tiles * samples + 4)[:, None] & (channel < channels)[None, :])"
    )
    found = Guards()
    inputs = CASE.inputs(torch.float32)
    out = found.empty((2, 4, 6), torch.float32)  # two tiles of 2 x 2 samples
    tables = crop_resize.crop_tables(inputs["boxes"], inputs["image_index"], 2, (1, 10, 12), False)
    crop_resize.crop_resize_fwd(inputs["features"], tables, inputs["image_index"], 2, out)
    with pytest.raises(AssertionError, match="wrote beyond its buffer"):
        found.check()

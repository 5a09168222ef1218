"""`features_grad` by Triton kernels, interpreted: cells that no sample reads are neither read nor written."""

import pytest
import torch
from cases import Case, ids
from interpreter import MATRIX, UNALIGNED, guarded, guards  # noqa: F401
from test_accumulate import NAMES, check, check_crop_resize

OPS = torch.ops.fila_kernels


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("case", [c for c in MATRIX if c.name in ("odd", "sliced", "closed_gate", "aligned")], ids=ids)
def test_cvfm(case, plan):
    check(case, torch.float32, "triton", plan=plan, make=guarded)


@pytest.mark.usefixtures("guards")
def test_float32_total_of_float16():
    check(UNALIGNED, torch.float16, "triton", torch.float32, make=guarded, plan="sample_first")


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", [c for c in MATRIX if c.name in NAMES], ids=ids)
def test_crop_resize(case):
    check_crop_resize(case, torch.float32, "triton")


def test_opcheck():
    inputs = Case("opcheck", tiles=2, images=1).inputs(torch.float32)
    checks = ("test_schema", "test_faketensor")
    total, rest = torch.randn(1, 10, 12, 6), (inputs["boxes"], inputs["image_index"])
    arguments = (total, torch.randn(2, 3, 3, 6), *rest, "triton")
    torch.library.opcheck(OPS.crop_resize_backward_.default, arguments, test_utils=checks)
    saved = torch.randn(32, 12), torch.randn(32, 8)
    arguments = torch.randn(2, 17, 8), *inputs.values(), *saved, 1, "product", "sample_first", [True] * 7, "triton"
    torch.library.opcheck(OPS.cvfm_backward_.default, (total, *arguments), test_utils=checks)

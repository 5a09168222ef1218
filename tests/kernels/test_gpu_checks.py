"""The checks of test_gpu.py on a CPU, where they find a backend right, and a wrong one wrong."""

import pytest
import torch
from gpu_checks import aligned_slice, channels_first, check, unchanged

from fila_kernels import cvfm
from fila_kernels.testing import Case

CASE = Case("small", prefix=2, token_width=16, hidden_width=24, feature_width=8, boxes="overlapping")


@pytest.mark.parametrize("change", [unchanged, channels_first, aligned_slice])
def test_backends_are_right(backend, change):
    for plan in ("sample_first", "project_first"):
        check(CASE, backend, torch.float32, device="cpu", change=change, plan=plan)
    check(CASE, backend, torch.bfloat16, device="cpu", change=change)


@pytest.mark.parametrize("name", ["features", "fc2_bias"])
def test_a_wrong_one_is_found(backend, name):
    def wrong(**arguments):
        return cvfm(**(arguments | {name: arguments[name] * 1.01}))

    with pytest.raises(AssertionError, match="above"):
        check(CASE, backend, torch.float32, device="cpu", function=wrong)

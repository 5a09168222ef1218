"""The two products with their epilogues against the vendor library's plain product of the same M, N and K.

`cublas` is `torch.mm` over rows that exist already, without bias, activation, gate or residual; `torch` is what eager
PyTorch needs to get the same result. GPU only.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure, roofline
from bench.cases import DTYPES, SUITES, Case
from bench.contest import Contest, Make
from bench.settings import Settings
from bench.timing import num_sets
from bench.variants import absent
from fila_kernels import planner, reference
from fila_kernels.call import Call, Shape

SETTINGS = Settings.read()
CASES = list(dict.fromkeys(case for suite in SETTINGS.suites() for case in SUITES.get(suite, ())))


class Operands:
    """One set of buffers: S and A beside the inputs, as the kernels keep them, rows [T, P + N, width]."""

    def __init__(self, case: Case, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        shape = Shape(
            case.tiles, case.prefix, case.grid, case.token_width, case.hidden_width, case.channels, case.images,
            case.side, case.side,
        )  # fmt: skip
        tokens = inputs["tokens"]
        plan = planner.choose(shape, tokens.dtype, tokens.device, "sample_first")
        self.call = Call(*inputs.values(), shape, "product", plan)
        rows = tokens.shape[:2]
        sampled = reference.crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], case.grid)
        self.sampled = tokens.new_zeros(*rows, case.channels)
        self.sampled[:, case.prefix :] = sampled.flatten(1, 2)
        self.joint = torch.cat([tokens, self.sampled], dim=-1)
        self.activated = F.gelu(F.linear(self.joint, inputs["fc1_weight"], inputs["fc1_bias"]))
        self.hidden_out = torch.empty_like(self.activated)
        self.out = torch.empty_like(tokens)


def ways(operands: list[Operands], part: str) -> dict[str, Make]:
    """Calls that give [T, P + N, H or D]."""
    from fila_kernels.backends.triton import gemm

    def fused(o: Operands) -> Tensor:
        if part == "fc1":
            gemm.fc1(o.call, o.sampled, None, o.hidden_out)
            return o.hidden_out
        gemm.fc2(o.call, o.activated, o.out, None)
        return o.out

    def plain(o: Operands) -> Tensor:
        left, weight, out = (
            (o.joint, o.call.fc1_weight, o.hidden_out) if part == "fc1" else (o.activated, o.call.fc2_weight, o.out)
        )
        torch.mm(left.flatten(0, 1), weight.t(), out=out.flatten(0, 1))
        return out

    def eager(o: Operands) -> Tensor:
        return defined(o, part, o.call.tokens.dtype)

    def make(function: Callable[[Operands], Tensor]) -> Make:
        return lambda index: lambda: function(operands[index])

    return {"cublas": make(plain), "torch": make(eager), "triton": make(fused)}


def defined(o: Operands, part: str, dtype: torch.dtype) -> Tensor:
    """The product with its epilogue, in any dtype."""
    i = {name: t.to(dtype) for name, t in o.inputs.items() if name != "image_index"}
    if part == "fc1":
        return F.gelu(F.linear(o.joint.to(dtype), i["fc1_weight"], i["fc1_bias"]))
    branch = F.linear(o.activated.to(dtype), i["fc2_weight"], i["fc2_bias"])
    return i["tokens"] + torch.tanh(i["alpha"] * branch)


@pytest.mark.bench
@pytest.mark.benchmark(timer=measure.own_time)
@pytest.mark.parametrize("part", ["fc1", "fc2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gemm(benchmark, case: Case, part: str) -> None:
    device = SETTINGS.torch_device()
    reason = absent("triton", device)
    if reason:
        pytest.skip(reason)
    if SETTINGS.time_is_up():
        pytest.skip("time is up")
    contest = Contest(SETTINGS, "gemm", case, part)
    names = contest.pending(["cublas", "torch", "triton"])
    if not names:
        pytest.skip("measured before")
    sets = num_sets(case.input_bytes(), device)
    operands = [Operands(case, case.inputs(seed, device)) for seed in range(sets)]
    found = ways(operands, part)
    prefix = case.prefix
    results = tuple(defined(operands[0], part, dtype)[:, prefix:] for dtype in (torch.float64, DTYPES[case.dtype]))
    rows = case.tiles * (case.prefix + case.grid**2)
    d, h = case.token_width, case.hidden_width
    depth, width = (d + case.channels, h) if part == "fc1" else (h, d)
    size = DTYPES[case.dtype].itemsize
    work = roofline.Work(2 * rows * depth * width, size * (rows * (depth + width) + depth * width))
    timed = {name: found[name] for name in names}
    red = contest.run(
        benchmark, timed, sets, ["triton"], (results[0], results[1]), {}, work, lambda result: result[:, prefix:],
        ungated=("cublas",),
    )  # fmt: skip
    assert not red, f"{case.name}, {part}: differs from the definition, so nothing is timed: {', '.join(red)}"

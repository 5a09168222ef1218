"""The two products of `cvfm` with their epilogues, by the triton backend, against the vendor library's plain product.

`cublas` is `torch.mm` of the same M, N and K over rows that exist already, without bias, activation, gate or residual.
`unfused` is the same result in eager PyTorch calls. GPU only.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import engine
from bench.engine import Comparison, Contestant, Step
from bench.roofline import gemm_work
from bench.variants import backend_obstacle
from bench.verify import Gate
from bench.workloads import DTYPES, SUITES, Workload, default_suite
from fila_kernels import planner, reference
from fila_kernels.call import Call

DIRECTIONS = ("fc1", "fc2")


def variants(device: torch.device, direction: str, names: Sequence[str] = ()) -> dict[str, str | None]:
    """The named contestants, or all, each with the reason it cannot run, or None."""
    obstacle = backend_obstacle("triton", device)
    return {name: obstacle for name in ("cublas", "unfused", "triton") if not names or name in names}


class Operands:
    """One set of buffers: beside the inputs S, [X ; S] and A as the kernels keep them, rows [T, P + N, width]."""

    def __init__(self, workload: Workload, inputs: dict[str, Tensor]) -> None:
        self.inputs, tokens = inputs, inputs["tokens"]
        plan = planner.choose(workload.shape, tokens.dtype, tokens.device, "sample_first", "triton")
        self.call = Call(*inputs.values(), workload.shape, "product", plan)
        sampled = reference.crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], workload.grid)
        self.sampled = tokens.new_zeros(*tokens.shape[:2], workload.channels)
        self.sampled[:, workload.prefix :] = sampled.flatten(1, 2)
        self.joint = torch.cat([tokens, self.sampled], dim=-1)
        self.activated = F.gelu(F.linear(self.joint, inputs["fc1_weight"], inputs["fc1_bias"]))
        self.outputs = {"fc1": torch.empty_like(self.activated), "fc2": torch.empty_like(tokens)}

    def fused(self, part: str) -> Tensor:
        from fila_kernels.backends.triton import gemm

        if part == "fc1":
            gemm.fc1(self.call, self.sampled, None, self.outputs[part])
        else:
            gemm.fc2(self.call, self.activated, self.outputs[part], None)
        return self.outputs[part]

    def plain(self, part: str) -> Tensor:
        left = self.joint if part == "fc1" else self.activated
        torch.mm(left.flatten(0, 1), self.inputs[f"{part}_weight"].t(), out=self.outputs[part].flatten(0, 1))
        return self.outputs[part]

    def unfused(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The product with its epilogue, in any dtype."""
        i = {name: t.to(dtype or t.dtype) for name, t in self.inputs.items() if name != "image_index"}
        if part == "fc1":
            return F.gelu(F.linear(self.joint.to(i["tokens"].dtype), i["fc1_weight"], i["fc1_bias"]))
        branch = F.linear(self.activated.to(i["tokens"].dtype), i["fc2_weight"], i["fc2_bias"])
        return i["tokens"] + torch.tanh(i["alpha"] * branch)


def comparison(workload: Workload, part: str, device: torch.device, names: Sequence[str]) -> Comparison:
    """The contestants over the same rows; prefix tokens' rows are computed and not judged."""
    sets = range(engine.num_sets(workload.input_bytes(), device))
    operands = [Operands(workload, workload.inputs(seed, device)) for seed in sets]
    calls: dict[str, Callable[[Operands, str], Tensor]] = {
        "cublas": Operands.plain, "unfused": Operands.unfused, "triton": Operands.fused,
    }  # fmt: skip

    def contestant(name: str) -> Contestant:
        def bind(index: int) -> Step:
            return lambda: calls[name](operands[index], part)

        return Contestant(name, bind, ours=name == "triton", gated=name != "cublas")

    def gate() -> Callable[[Contestant, Tensor], object]:
        exact, eager = (
            operands[0].unfused(part, dtype)[:, workload.prefix :] for dtype in (torch.float64, DTYPES[workload.dtype])
        )
        judge = Gate({part: exact}, {part: eager})
        return lambda _, found: judge(found[:, workload.prefix :])

    work = gemm_work(workload, part)
    contestants = [contestant(name) for name in names]
    return Comparison("gemm", workload.name, part, workload.dtype, contestants, gate, len(operands), work, [work])


DEVICE = engine.default_device()


@pytest.mark.skipif(backend_obstacle("triton", DEVICE) is not None, reason="Triton's kernels need a CUDA device")
@pytest.mark.parametrize("variant", ["cublas", "triton"])
@pytest.mark.parametrize("part", DIRECTIONS)
@pytest.mark.parametrize("workload", SUITES[default_suite(DEVICE)], ids=lambda workload: workload.name)
def test_gemm(benchmark, workload: Workload, part: str, variant: str) -> None:
    engine.run_benchmark(benchmark, comparison(workload, part, DEVICE, [variant]), DEVICE)

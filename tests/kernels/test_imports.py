"""`import fila_kernels` imports nothing heavy beyond what `import torch` imports."""

import subprocess
import sys

import pytest

# Each takes longer to import than the whole package, and each came in by a decorator or a registration once.
HEAVY = (
    "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "triton", "sympy", "networkx", "transformers",
)  # fmt: skip


def modules_after(*statements: str) -> set[str]:
    script = "; ".join(("import sys", *statements, "print(*sys.modules)"))
    return set(subprocess.check_output([sys.executable, "-c", script], text=True).split())


@pytest.mark.parametrize("module", ["fila_kernels", "fila_kernels.aot, fila_kernels.info, fila_kernels.testing"])
def test_nothing_heavy_comes_along(module):
    brought = modules_after("import torch", f"import {module}") - modules_after("import torch")
    assert "fila_kernels" in brought
    assert not brought & set(HEAVY)


def test_a_call_on_the_cpu_brings_nothing_heavy_either():
    call = "import torch, fila_kernels", "fila_kernels.CVFM(8, 6)"
    call += (
        "fila_kernels.crop_resize(torch.ones(1, 4, 4, 3), torch.tensor([[0., 0., 4., 4.]]), torch.tensor([0]), 2)",
    )
    assert not (modules_after(*call) - modules_after("import torch")) & set(HEAVY)


def test_the_check_sees_what_is_heavy():
    brought = modules_after("import torch", "import fila_kernels.flops")
    assert "torch.utils.flop_counter" in brought

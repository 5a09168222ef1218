"""The operation where users put it: compiled, distributed, checkpointed, with adapters, counted, in a graph.

Two processes with gloo stand for a cluster; their result must equal that of one process on all tiles.
"""

import copy
import faulthandler
import functools
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fila_kernels import CVFM, cvfm, dispatch, flops, reference
from fila_kernels.testing import DIFFERENTIABLE, Case, gradients

CASE = Case("integration", tiles=4, images=2)
WORLD = 2


def module_of(seed: int = 0, **settings) -> CVFM:
    torch.manual_seed(seed)
    module = CVFM(CASE.token_width, CASE.feature_width, CASE.hidden_width, **settings)
    module.alpha.data.fill_(0.5)
    return module


def arguments(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    inputs = CASE.inputs(dtype)
    return [inputs[name] for name in ("tokens", "features", "boxes", "image_index")]


class Tower(nn.Module):
    """Two fusions with a layer between, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = module_of(0), module_of(1, gate="scale")
        self.between = nn.Linear(CASE.token_width, CASE.token_width)

    def forward(self, tokens, features, boxes, image_index):
        x = self.between(self.first(tokens, features, boxes, image_index))
        return self.second(x, features, boxes, image_index)


def gradients_of(model: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] is not None, name
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.abs().max(), f"{name}: {float(error):.2e} of {float(value.abs().max()):.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_a_compiled_tower_trains_as_an_eager_one(low):
    """No graph break and no second compilation for other numbers of tiles and other maps."""
    model, plain = Tower(), Tower()
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for tiles, height in ((3, 10), (5, 7), (2, 12)):
        inputs = Case("compile", tiles=tiles, height=height).inputs(torch.float32)
        given = [inputs[name] for name in ("tokens", "features", "boxes", "image_index")]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            found, expected = gradients_of(compiled, given), gradients_of(plain, given)
        assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
    assert counter.frame_count == 1


def test_a_checkpointed_fusion_keeps_nothing_and_computes_the_same():
    inputs, model = arguments(), Tower()
    kept: list[int] = []

    def size(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return checkpoint(self.inner, *args, use_reentrant=False)

    expected = gradients_of(model, inputs)
    expected = {name: grad.clone() for name, grad in expected.items()}
    with torch.autograd.graph.saved_tensors_hooks(size, lambda tensor: tensor):
        found = gradients_of(Checkpointed(copy.deepcopy(model)), inputs)
    assert_same({name.removeprefix("inner."): g for name, g in found.items()}, expected, tolerance=0.0)
    samples = CASE.tiles * CASE.grid**2
    outside = [count for count in kept if count >= samples * CASE.hidden_width]
    assert len(outside) <= 2, "between forward and backward nothing as large as the hidden activation is kept"


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("frozen", [(), ("features",), ("tokens", "features")])
def test_the_flop_counter_counts_what_eager_would_do(gate, frozen):
    flops.register()
    inputs = CASE.inputs(torch.float32)
    wanted = tuple(name for name in DIFFERENTIABLE if name not in frozen)
    grad = torch.randn_like(inputs["tokens"])

    def count(function, **settings) -> int:
        with FlopCounterMode(display=False) as counter:
            gradients(function, inputs, grad, wanted, gate=gate, **settings)
        return counter.get_total_flops()

    rows, h, d, c = CASE.tiles * CASE.grid**2, CASE.hidden_width, CASE.token_width, CASE.feature_width
    forward = 2 * rows * h * (2 * d + c)
    # Eager cannot tell the two halves of its concatenation apart: it wants both gradients or none.
    spared = 2 * rows * h * c if frozen == ("features",) else 0
    expected = count(reference.cvfm) - spared
    assert count(cvfm) == expected > 2 * forward
    again = forward if gate == "product" else forward - 2 * rows * h * d
    assert count(cvfm, recompute=True) == expected + again


def test_lora_trains_under_autocast_and_merges_back():
    peft = pytest.importorskip("peft")
    plain = module_of()
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["fc1", "fc2"], r=2))
    inputs = arguments()
    fused = model.base_model.model
    assert "fc1 is a" in fused.fallback_reason
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(*inputs).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = model(*inputs).detach()
    merged = model.merge_and_unload()
    assert merged.fallback_reason is None, "merged layers are plain again and take the fused operation"
    torch.testing.assert_close(merged(*inputs), adapted)
    assert not torch.allclose(adapted, plain(*inputs))


def in_process(rank: int, folder: str, strategy: str) -> None:
    """One of two ranks: its half of the tiles, and gradients that must be those of all tiles at once."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.set_num_threads(1)
    # A rank that waits for ever says where, and fails the test.
    faulthandler.dump_traceback_later(100, exit=True)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=limit)
    try:
        model, single = Tower(), Tower()
        single.load_state_dict(model.state_dict())
        tokens, features, boxes, image_index = arguments()
        half = slice(rank * CASE.tiles // WORLD, (rank + 1) * CASE.tiles // WORLD)
        share = [tokens[half], features, boxes[half], image_index[half]]
        if strategy == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
            prefix = "module."
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            shard = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy())
            if strategy == "fsdp2-layers":
                for part in (model.first, model.second):
                    shard(part.fc1)
                    shard(part.fc2)
            elif strategy == "fsdp2":
                shard(model.first)
                shard(model.second)
            wrapped, prefix = shard(model), ""
        found = gradients_of(wrapped, share)
        if strategy == "fsdp2-layers":
            assert "FSDP" in str(model.first.fallback_reason)
        full = {
            name.removeprefix(prefix): grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            for name, grad in found.items()
        }
        assert_same(full, gradients_of(single, [tokens, features, boxes, image_index]))
        dist.barrier()  # neither leaves while the other still listens to it
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-root", "fsdp2-layers"])
def test_two_processes_compute_what_one_does(strategy, tmp_path):
    torch.multiprocessing.spawn(in_process, (str(tmp_path), strategy), nprocs=WORLD)


def test_the_comparison_of_processes_can_fail():
    expected = gradients_of(module_of(), arguments())
    off = {name: grad + 1e-2 * grad.abs().max() for name, grad in expected.items()}
    with pytest.raises(AssertionError, match="of"):
        assert_same(off, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_cuda_graph_replays_forward_and_backward(recompute):
    usable, reason = dispatch.available("triton")
    if not usable:
        pytest.skip(f"eager calls synchronise on a GPU, and of kernels: {reason}")
    inputs = {name: tensor.cuda() for name, tensor in CASE.inputs(torch.bfloat16).items()}
    leaves = {name: t.requires_grad_() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    grad = torch.randn_like(inputs["tokens"])

    def step():
        out = cvfm(**leaves, recompute=recompute, backend="triton")
        return out, *torch.autograd.grad(out, [leaves[name] for name in DIFFERENTIABLE], grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["tokens"].add_(1)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)

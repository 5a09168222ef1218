"""`CVFM` as a module: state dict, start, replaced layers."""

import pytest
import torch
from torch import nn

from fila_kernels import CVFM
from fila_kernels.testing import Case


def arguments(dtype=torch.float32):
    inputs = Case("module").inputs(dtype)
    return inputs["tokens"], inputs["features"], inputs["boxes"], inputs["image_index"]


class LowRank(nn.Module):
    """What LoRA makes of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_state_dict_and_start():
    module = CVFM(8, 6)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "alpha": [1], "fc1.weight": [8, 14], "fc1.bias": [8], "fc2.weight": [8, 8], "fc2.bias": [8],
    }  # fmt: skip
    assert module.alpha.item() == 0
    tokens, *rest = arguments()
    assert torch.equal(module(tokens, *rest), tokens)
    assert module.fallback_reason is None


def test_a_fresh_module_trains_its_gate_first():
    module = CVFM(8, 6)
    module(*arguments()).square().sum().backward()
    assert module.alpha.grad.abs() > 0
    assert not module.fc1.weight.grad.any()


@pytest.mark.parametrize("gate", ["product", "scale"])
def test_replaced_layers_are_called(gate):
    module = CVFM(8, 6, 12, gate=gate)
    module.alpha.data.fill_(0.5)
    tokens, *rest = arguments()
    expected = module(tokens, *rest)
    module.fc1, module.fc2 = LowRank(module.fc1), LowRank(module.fc2)
    assert "fc1 is a LowRank" in module.fallback_reason
    with torch.no_grad():
        module.fc1.up.weight.zero_()
        module.fc2.up.weight.zero_()
    torch.testing.assert_close(module(tokens, *rest), expected)
    nn.init.normal_(module.fc1.up.weight)
    nn.init.normal_(module.fc2.up.weight)
    out = module(tokens, *rest)
    assert not torch.allclose(out, expected)
    out.sum().backward()
    assert module.fc1.down.weight.grad is not None
    assert module.fc1.base.weight.grad is None


def test_peft_lora_on_both_layers():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(CVFM(8, 6, 12), peft.LoraConfig(target_modules=["fc1", "fc2"], r=2))
    module = wrapped.base_model.model
    module.alpha.data.fill_(0.5)
    assert module.fallback_reason is not None
    module(*arguments()).sum().backward()
    trained = [name for name, p in module.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


def test_hooks_run():
    module = CVFM(8, 6)
    seen = []
    module.fc1.register_forward_hook(lambda *_: seen.append(1))
    module(*arguments())
    assert seen == [1]


def test_a_layer_whose_forward_was_replaced_is_called():
    """What accelerate does to offload: weights on meta until the layer's own `forward` brings them."""
    module = CVFM(8, 6)
    module.alpha.data.fill_(0.5)
    expected = module(*arguments())
    weight, bias = (parameter.detach() for parameter in (module.fc1.weight, module.fc1.bias))
    module.fc1.forward = lambda x: nn.functional.linear(x, weight, bias)
    module.fc1.to("meta")
    assert module.fallback_reason == "fc1 has a forward of its own, which only a call runs"
    torch.testing.assert_close(module(*arguments()), expected)


class Halved(torch.Tensor):
    """A weight kept as half of itself, as quantisation keeps one: a wrapper over another tensor."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half_of = half

    def __tensor_flatten__(self):
        return ["half_of"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Halved(inner["half_of"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Halved(args[0].half_of)
        plain = [arg.half_of * 2 if isinstance(arg, Halved) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


def test_a_layer_whose_weight_wraps_another_tensor_is_called():
    module = CVFM(8, 6)
    module.alpha.data.fill_(0.5)
    expected = module(*arguments())
    module.fc1.weight = nn.Parameter(Halved(module.fc1.weight.detach() / 2), requires_grad=False)
    assert module.fallback_reason == "fc1.weight is a Halved, which only a call can read"
    torch.testing.assert_close(module(*arguments()), expected)


@pytest.mark.parametrize(
    "bad",
    [
        {"token_width": 0}, {"feature_width": -1}, {"hidden_width": 0}, {"token_width": 8.0}, {"gate": "sum"},
        {"gate": None}, {"plan": "fast"}, {"plan": 3}, {"backend": "cudnn"}, {"backend": 3}, {"recompute": 1},
        {"num_prefix_tokens": -1}, {"num_prefix_tokens": 1.0}, {"num_prefix_tokens": True},
    ],
)  # fmt: skip
def test_bad_settings(bad):
    settings = {"token_width": 8, "feature_width": 6} | bad
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected .* got"):
        CVFM(**settings)


def test_a_module_from_the_meta_device_is_a_fresh_one():
    torch.manual_seed(3)
    fresh = CVFM(8, 6, 12)
    module = CVFM(8, 6, 12, device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(3)
    module.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    tokens, *rest = arguments()
    assert torch.equal(module(tokens, *rest), tokens)

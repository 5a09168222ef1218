"""The end-to-end bench's gate: green for this package's backend, red for a wrong result and for a wrong gradient."""

import pytest
import torch
from torch import nn

from bench import e2e, records
from fila import preset

ARGUMENTS = ["--device", "cpu", "--dtype", "float32", "--rounds", "1", "--rule", "fixed"]


def gate_and_tower(operation: str):
    config, device = preset("fila-nano").vision_config, torch.device("cpu")
    config.high_res_rule = "fixed"
    makers, _ = e2e.towers(config, device, torch.float32)
    return e2e.Gate(makers["fusion_tuned_eager"], device, operation), makers["fusion_torch"]()


class Hook(torch.autograd.Function):
    """The identity with a gradient that is one per cent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


@pytest.mark.parametrize("operation", e2e.OPERATIONS)
def test_the_gate_is_green_for_the_torch_backend_and_sees_a_wrong_parameter(operation):
    gate, tower = gate_and_tower(operation)
    error, red = gate(tower)
    assert not red
    assert 0 < error < 3
    nn.init.constant_(tower.fusion[-1].alpha, 0.51)
    assert "above" in gate(tower)[1]


def test_a_wrong_gradient_alone_is_red():
    gate, tower = gate_and_tower("tower-step")
    tower.fusion[0].register_forward_hook(lambda module, inputs, out: Hook.apply(out))
    assert gate(tower)[1].startswith("gradients of ")


def test_red_ends_the_run_without_a_row_or_a_ratio(tmp_path, monkeypatch, capsys):
    path = tmp_path / "e2e.csv"
    monkeypatch.setattr(e2e.Gate, "__call__", lambda self, model: (9.0, "made up"))
    assert e2e.main([*ARGUMENTS, "--csv", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "red: made up" in printed
    assert "geometric mean" not in printed
    assert not records.read(path), "what is red is not taken for done when the run is resumed"

"""CVFM in a training loop of transformers' own LLaVA-NeXT: gates leave zero, and the loss falls below a run without."""

import importlib.util

import pytest


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gates_open_and_help(root, seed):
    spec = importlib.util.spec_from_file_location("drop_in", root / "examples/llava_next_with_cvfm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (loss, gates), (shut, zeros) = example.train(seed, False), example.train(seed, True)
    assert zeros == [0.0, 0.0]
    assert all(abs(gate) > 0.05 for gate in gates)
    assert loss < shut / 2

"""Every example in the package's docstrings runs."""

import doctest
import importlib

import pytest
import torch

MODULES = ("functional", "module", "info")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"fila_kernels.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0

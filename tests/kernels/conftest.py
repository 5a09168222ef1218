"""Runs the same tests over both backends of any machine: the compiled one and the one of PyTorch calls.

Tests of interpreted Triton kernels run in processes of their own (test_interpreter.py) and are not collected elsewhere.
"""

import os

import pytest

from fila_kernels import dispatch
from fila_kernels.backends.native import library

collect_ignore_glob = ["test_aot.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton_*.py"]


@pytest.fixture(params=["native", "eager"])
def backend(request, monkeypatch) -> str:
    """The backend of calls that name none."""
    if request.param == "native" and not library.load()[0]:
        pytest.skip(f"native library {library.load()[1]}")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, request.param)
    return request.param

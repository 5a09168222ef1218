"""With the native library and without it: both ways through the `torch` backend answer to the same tests.

Interpreted Triton kernels have processes of their own, see test_interpreter.py; elsewhere they are not collected.
"""

import os

import pytest

from fila_kernels import native

collect_ignore_glob = ["test_aot.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton_*.py"]


@pytest.fixture(params=["with_library", "without_library"])
def library(request, monkeypatch) -> str:
    if request.param == "without_library":
        monkeypatch.setattr(native, "load", lambda: (False, "switched off by a test"))
    elif not native.load()[0]:
        pytest.skip(f"native library {native.load()[1]}")
    return request.param

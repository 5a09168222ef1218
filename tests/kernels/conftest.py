"""With the native library and without it: both ways through the `torch` backend answer to the same tests."""

import pytest

from fila_kernels import native


@pytest.fixture(params=["with_library", "without_library"])
def library(request, monkeypatch) -> str:
    if request.param == "without_library":
        monkeypatch.setattr(native, "load", lambda: (False, "switched off by a test"))
    elif not native.load()[0]:
        pytest.skip(f"native library {native.load()[1]}")
    return request.param

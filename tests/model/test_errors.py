"""Error messages: running out of memory is recognised, and every message fits one line."""

import pytest
import torch

from fila.errors import memory_for, one_line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator:\n can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_allocators_words_are_known(error: Exception) -> None:
    with pytest.raises(MemoryError, match=r"^expected enough memory for a picture, got: .+$"), memory_for("a picture"):
        raise error


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_for("a picture"):
        raise RuntimeError("shapes do not match")


def test_one_line() -> None:
    assert one_line(ValueError("expected one,\n  got two")) == "expected one, got two"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"

"""Error messages: running out of memory is recognised, and every message fits one line."""

import pytest
import torch

from fila.errors import memory_for, one_line, printable


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator:\n can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
        OSError(12, "Cannot allocate memory"),
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
    assert one_line("a\x1b[2J \udcff \u202eb") == "a\\x1b[2J \\udcff \\u202eb"


def test_letters_of_every_script_stay_as_they_are() -> None:
    assert printable("Straße 東京 \u3000 می\u200cخواهم 👩\u200d🚀") == "Straße 東京 \u3000 می\u200cخواهم 👩\u200d🚀"
    assert printable("a\tb\n", kept="\n\t") == "a\tb\n"

"""Defines the errors about pictures, puts any error into one line, and recognises running out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Allocators' own words: torch has an error class for accelerators only, and not for every way of running out.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class ImageError(ValueError):
    """A picture that cannot be used; the message names it, what was expected and what came."""


class ImageWarning(UserWarning):
    """A picture that can be used, though not all of it was."""


def one_line(error: object) -> str:
    """The message without line breaks; the name of the class where there is none.

    Example:
        >>> one_line(ValueError("expected one,  got\\n two"))
        'expected one, got two'
    """
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator, of the CPU or of an accelerator, found no memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raises `MemoryError` with a message where any allocator finds no memory; all else passes through.

    Example:
        >>> with memory_for("a picture"):
        ...     raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        Traceback (most recent call last):
        MemoryError: expected enough memory for a picture, got: Tried to allocate 2 GiB
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"expected enough memory for {what}, got: {one_line(error)}") from error

"""Defines the errors about pictures, puts any error into one line, and recognises foreign code's ways of failing."""

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Allocators' own words, in lower case: torch has an error class for accelerators only, and not for every way of running
# out. "bad_alloc" is what C++ says, in the native operation; "could not create a memory" is oneDNN's. The last is
# torch's C interface there, which does not say why a call with arguments that were checked has failed.
OUT_OF_MEMORY = (
    "defaultcpuallocator", "out of memory", "alloc_failed", "outofmemory", "memoryallocation", "bad_alloc",
    "bad_array_new_length", "cannot allocate memory", "not enough memory", "could not create a memory",
    "api call failed",
)  # fmt: skip
LINE_BREAKS_AND_DIRECTIONS = "\u2028\u2029\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class ImageError(ValueError):
    """A picture that cannot be used; the message names it, what was expected and what came."""


class ImageWarning(UserWarning):
    """A picture that can be used, though not all of it was."""


def printable(text: str, kept: str = "") -> str:
    """The text with what a terminal would obey, or could not show, written as Python escapes.

    Those are control characters, line breaks, marks of writing direction, and bytes of a file name that are no text.

    Args:
        kept: characters to leave as they are.

    Example:
        >>> print(printable("a\\nb\\x1b[2J\\udcff.png"))
        a\\nb\\x1b[2J\\udcff.png
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in kept and (c in LINE_BREAKS_AND_DIRECTIONS or unicodedata.category(c) in ("Cc", "Cs"))
        else c
        for c in text
    )


def one_line(error: object) -> str:
    """The message without line breaks and control characters; the name of the class where there is none.

    Example:
        >>> one_line(ValueError("expected one,  got\\n two"))
        'expected one, got two'
    """
    return printable(" ".join(str(error).split())) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of the CPU or of an accelerator, found no memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, SystemError)) and any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


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
    except (MemoryError, RuntimeError, SystemError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"expected enough memory for {what}, got: {one_line(error)}") from error


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises `RuntimeError` where Rust code (tokenizers, safetensors) panics, which is no `Exception` otherwise."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that cannot be imported
            raise
        raise RuntimeError(one_line(error)) from error

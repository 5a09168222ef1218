"""Writes to standard output and standard error, whatever state they are in.

Either may be closed, full, open for reading only, or of an encoding that lacks a character. An answer that cannot be
written is an `OutputError`; a message that cannot be written is lost, since there is no other place to say so.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class OutputError(OSError):
    """Standard output cannot be written to."""


class ReaderGone(OutputError):
    """The process that read standard output has ended."""


def check_output() -> None:
    """Finds out before any work that standard output takes nothing, where that can be known.

    Raises:
        OutputError: it is closed, or open for reading only.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise OutputError("standard output: expected one that can be written to, got a closed one")
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # not a file
    try:
        os.write(descriptor, b"")
    except OSError as error:
        raise _output_error(error) from error


def write(line: str) -> None:
    """Writes a line to standard output at once.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        sys.stdout.write(_encodable(line, sys.stdout) + "\n")
    except (OSError, ValueError) as error:
        raise _output_error(error) from error
    flush()


def flush() -> None:
    """Writes what standard output still holds.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        raise _output_error(error) from error


def say(line: str) -> None:
    """Writes a line to standard error, if that is possible."""
    if sys.stderr is None:  # `print` would take standard output instead
        return
    try:
        sys.stderr.write(_encodable(line, sys.stderr) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _let_go(sys.stderr)


@contextlib.contextmanager
def without_libraries() -> Iterator[None]:
    """Discards what native libraries write by themselves: libtiff about damaged files, tokenizers to standard output.

    Their faults arrive as exceptions, and get their one line. Nothing of ours is written meanwhile.
    """
    with contextlib.ExitStack() as stack:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # closed, or no descriptor is left
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, descriptor)
                _discard(descriptor)
        yield


def _output_error(error: Exception) -> OutputError:
    _let_go(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return ReaderGone("standard output: its reader has gone")
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"standard output: expected one that can be written to, got: {reason}")


def _encodable(text: str, stream: Any) -> str:
    """The text with escapes for the characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _let_go(stream: Any) -> None:
    """Discards what the stream still holds; else Python complains when it ends, and changes the exit code."""
    with contextlib.suppress(OSError, ValueError):
        _discard(stream.fileno())


def _discard(descriptor: int) -> None:
    """What is written to the descriptor goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)

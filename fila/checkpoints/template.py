"""Tries a checkpoint's chat template, a program that somebody else wrote, under a limit on its time.

transformers runs it in Jinja's sandbox, which keeps it from files and from Python's insides but not from running on. A
power is refused before it runs, since it alone can take forever in one step; the rest is stopped between its lines.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

from fila.checkpoints.check import Checkpoint

MOST_SECONDS = 5.0  # of the processor's time; real templates take milliseconds


class _TooLong(BaseException):
    """No `Exception`: code that tries a template and goes on when it fails would go on without the limit."""


def check_template(checkpoint: Checkpoint, text: str | None) -> None:
    """Refuses a template with a power in it; one that is no template is left to those who read it.

    Raises:
        CheckpointError: the template computes a power.
    """
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(text or "")
    except (TemplateSyntaxError, RecursionError):  # transformers knows further tags
        powers = "**" in (text or "")
    else:
        powers = any(True for _ in parsed.find_all(nodes.Pow))
    if powers:
        raise checkpoint.error("expected a chat template that computes no powers, got one with **")


@contextmanager
def limited_time(checkpoint: Checkpoint) -> Iterator[None]:
    """Stops templates that run within, in this thread, when they take too long.

    Raises:
        CheckpointError: they took too long.
    """
    end = time.thread_time() + MOST_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLong
        return trace if frame.f_code.co_filename.startswith("<") else None  # only a template's own lines

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except _TooLong as error:
        raise checkpoint.error(f"expected a chat template that takes at most {MOST_SECONDS:g} seconds") from error
    finally:
        sys.settrace(before)

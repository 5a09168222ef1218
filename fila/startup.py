"""Prepares the process of the command `fila` before the slow imports, which `fila/__init__.py` begins with.

The command's own code runs after `import fila`, which takes seconds. Until then Ctrl-C would end in a traceback, and a
file could be opened under the number of a standard stream that is closed: what is written to that stream would land in
the file. A process that imports `fila` as a library is left as it is.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def is_program() -> bool:
    """Whether this process is the command `fila` or `python -m fila`, not another program that imports the package."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name != "-m":  # what stands there while Python looks for the module
        return name in ("fila", "fila.exe")
    arguments = sys.orig_argv
    at = next((i for i, argument in enumerate(arguments) if argument.startswith("-m")), len(arguments))
    module = [*arguments, ""][at + 1] if arguments[at : at + 1] == ["-m"] else "".join(arguments[at : at + 1])[2:]
    return module in ("fila", "fila.cli", "fila.__main__")


def prepare() -> None:
    """Takes the numbers of closed standard streams, and lets Ctrl-C end the process at once and in silence."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    interrupt_at_once()


def interrupt_at_once() -> None:
    """Ctrl-C ends the process, with no clean-up: nothing that would need any is under way."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else someone has chosen to ignore it
        signal.signal(signal.SIGINT, _leave)


def interrupt_by_exception() -> None:
    """Ctrl-C raises `KeyboardInterrupt`, as it does in every Python program."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


if is_program():
    prepare()

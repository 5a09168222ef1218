"""Silences transformers in the thread that loads a checkpoint: its reports are checked here, and raised."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_bars = threading.Lock()
_quiet_threads = 0
_bars_were_on = False


class _OtherThreads(logging.Filter):
    """Lets through what threads other than the one that made it have to say."""

    def __init__(self) -> None:
        super().__init__()
        self.silent = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.silent or not record.name.startswith("transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' reports in this thread.

    Progress bars have one switch for the process: the first thread turns them off, the last one sets it back.
    """
    own = _OtherThreads()
    handlers = [*transformers_logging.get_logger("transformers").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(own)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        for handler in handlers:
            handler.removeFilter(own)


def _count(step: int) -> None:
    global _quiet_threads, _bars_were_on
    with _bars:
        if not _quiet_threads:
            _bars_were_on = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()
        _quiet_threads += step
        if not _quiet_threads and _bars_were_on:
            transformers_logging.enable_progress_bar()

"""Files that outlive a kill: a reader finds the old contents or the new, never a part; and what was under way."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIME_IS_UP = 75  # EX_TEMPFAIL, the exit status of a command that another call goes on with
LONGEST = 120.0  # seconds that a step may take, compilation included; more counts as hung


def replace(path: Path, contents: str | bytes) -> None:
    """Write the contents beside the file and rename them onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    beside.replace(path)


class UnderWay:
    """The step that a process is at, in a file for whoever watches the process and starts the next one.

    The watcher ends a step that takes longer than its limit. It writes down why a step ended, and the next process
    leaves that step out. Without a path nothing is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def begin(self, name: str, step: Mapping[str, Any], limit: float) -> None:
        """Say what begins now, in words and as values, and after how many seconds it counts as hung."""
        if self.path is not None:
            replace(self.path, json.dumps({"name": name, "step": dict(step), "limit": limit, "since": time.time()}))

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        return json.loads(self.path.read_text())

    def overdue(self) -> bool:
        found = self.read()
        return found is not None and "ended" not in found and time.time() - found["since"] > found["limit"]

    def blame(self, reason: str) -> bool:
        """Write down why the process ended; False if it was at no step."""
        found = self.read()
        if found is None or self.path is None:
            return False
        replace(self.path, json.dumps(found | {"ended": reason}))
        return True

    def blamed(self) -> tuple[dict[str, Any], str] | None:
        """The step at which an earlier process ended and the reason, once."""
        found = self.read()
        self.end()
        return (found["step"], found["ended"]) if found and "ended" in found else None

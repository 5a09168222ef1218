"""How much memory one call needs beyond what was there: growth of the peak resident set.

The meter is the kernel's VmHWM, reset through /proc/self/clear_refs. It counts every allocator alike (torch's, oneDNN's
scratch, calloc) and only pages that are touched. Linux only.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

METER = "growth of VmHWM over one call after clear_refs, bytes"


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes by which `call` lifts the resident set at its peak, its results included."""
    call()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)

"""Tuned tables: `tables/<device>.json`, written by `bench/tune.py` on the device itself, read here and nowhere else.

A table has the schema's number, the device's name, measured plans and measured configs::

    {"schema": 1, "device": "NVIDIA H200",
     "plans": [{"shape": {"tiles": 40, ...}, "dtype": "bfloat16",
                "forward": "sample_first", "weight_gradient": "sample_first", "feature_gradient": "sample_first"}],
     "configs": [{"kernel": "fc1", "problem": [23080, 1024, 1216], "dtype": "bfloat16",
                  "config": {"block_m": 128, ...}}]}

An entry stands for every problem whose sizes are all within a factor of two of its own; the nearest one is taken.
"""

import json
import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fila_kernels.backends.triton.configs import config_from, plain
from fila_kernels.shape import Shape

SCHEMA = 1
PLAN = "plan"  # beside the kernels' names
FOLDER = Path(__file__).resolve().parent / "tables"


def path_of(device_name: str) -> Path:
    """Where a device's table lies."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json")


def distance(left: Sequence[int], right: Sequence[int]) -> float:
    """The sum of the sizes' ratios in powers of two; infinite if one is beyond a factor of two."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        apart = abs(math.log2(max(a, 1) / max(b, 1)))
        if apart > 1 or (a == 0) != (b == 0):
            return math.inf
        total += apart
    return total


class Table:
    """The entries of one device; empty where it was never tuned."""

    def __init__(self, entries: dict[str, Any] | None = None) -> None:
        # By what is asked about ("plan", or a kernel's name) and dtype: sizes and what was measured for them.
        self._measured: dict[tuple[str, str], list[tuple[tuple[int, ...], dict[str, Any]]]] = {}
        self._found: dict[Any, Any] = {}
        for entry in (entries or {}).get("plans", []):
            plans = {k: entry[k] for k in entry if k not in ("shape", "dtype")}
            self._add(PLAN, entry["dtype"], Shape(**entry["shape"]), plans)
        for entry in (entries or {}).get("configs", []):
            config = config_from(entry["kernel"], entry["config"])
            self._add(entry["kernel"], entry["dtype"], tuple(entry["problem"]), plain(config))

    def _add(self, subject: str, dtype: str, sizes: tuple[int, ...], values: dict[str, Any]) -> None:
        self._measured.setdefault((subject, dtype), []).append((sizes, values))

    def __len__(self) -> int:
        return sum(map(len, self._measured.values()))

    def _nearest(self, subject: str, sizes: Sequence[int], dtype: torch.dtype) -> tuple[dict[str, Any], bool] | None:
        """The nearest entry's values and whether its sizes are the very same; looked for once: every call asks."""
        key = (subject, tuple(sizes), dtype)
        if key not in self._found:
            entries = self._measured.get((subject, str(dtype).removeprefix("torch.")), [])
            near = [(distance(sizes, at), values) for at, values in entries]
            away, values = min(near, key=lambda entry: entry[0], default=(math.inf, {}))
            self._found[key] = (values, away == 0) if away < math.inf else None
        return self._found[key]

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[dict[str, str], bool] | None:
        """The measured plan of each direction for the nearest shape, and whether that is the very shape."""
        return self._nearest(PLAN, shape, dtype)

    def config(self, kernel: str, problem: Sequence[int], dtype: torch.dtype) -> dict[str, Any] | None:
        """The measured config for the nearest problem of a kernel, as plain values."""
        found = self._nearest(kernel, problem, dtype)
        return None if found is None else found[0]


@cache
def load(device_name: str) -> Table:
    """The device's table; one that cannot be used is named in a warning, once a process, and counts as empty."""
    path = path_of(device_name)
    if not path.exists():
        return Table()
    try:
        entries = json.loads(path.read_text())
        if entries["schema"] != SCHEMA:
            raise ValueError(f"schema {entries['schema']}, this version reads {SCHEMA}")
        return Table(entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fila_kernels: {path} is not used: {error!r}", stacklevel=2)
        return Table()

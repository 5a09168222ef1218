"""Reads tuned tables: `tables/<device>.json`, which `bench/tune.py` writes on the device itself.

A table has the schema's number, the device's name, measured plans and measured configs::

    {"schema": 1, "device": "NVIDIA H200",
     "plans": [{"shape": {"tiles": 40, ...}, "dtype": "bfloat16",
                "forward": "sample_first", "weight_gradient": "sample_first", "feature_gradient": "sample_first"}],
     "configs": [{"kernel": "fc1", "problem": [23080, 1024, 1216], "dtype": "bfloat16",
                  "config": {"block_m": 128, ...}}]}

An entry stands for every problem whose sizes are all within a factor of two of its own; the nearest entry is taken.
Plans and configs are plain values here; the backend interprets a config. What the tuner found wrong it lists under
`refused`, for itself alone.
"""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fila_kernels.call import DIRECTIONS, UNMEASURED, Measured, Shape

SCHEMA = 1
PLAN = "plan"  # beside the kernels' names
FOLDER = Path(__file__).resolve().parent / "tables"


def path_of(device_name: str) -> Path:
    """The file of a device's table."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json")


class Table:
    """The entries of one device, by dtype; empty where it was never tuned."""

    def __init__(self, entries: dict[str, Any] | None = None) -> None:
        self._plans = self._by_dtype(
            (entry["dtype"], PLAN, Shape(**entry["shape"]), {direction: entry[direction] for direction in DIRECTIONS})
            for entry in (entries or {}).get("plans", [])
        )
        self._configs = self._by_dtype(
            (entry["dtype"], entry["kernel"], entry["problem"], dict(entry["config"]))
            for entry in (entries or {}).get("configs", [])
        )

    @staticmethod
    def _by_dtype(entries: Iterable[tuple[str, str, Sequence[int], dict[str, Any]]]) -> dict[str, Measured]:
        grouped: dict[str, list[tuple[str, Sequence[int], dict[str, Any]]]] = {}
        for dtype, *entry in entries:
            grouped.setdefault(dtype, []).append(tuple(entry))  # type: ignore[arg-type]
        return {dtype: Measured(found) for dtype, found in grouped.items()}

    def __len__(self) -> int:
        return sum(map(len, (*self._plans.values(), *self._configs.values())))

    def plan(self, shape: Shape, dtype: torch.dtype) -> tuple[dict[str, str], bool] | None:
        """The measured plan of each direction for the nearest shape, and whether that is the very shape."""
        return self._plans.get(str(dtype).removeprefix("torch."), UNMEASURED).nearest(PLAN, shape)

    def configs(self, dtype: torch.dtype) -> Measured:
        """The measured launch configs of each kernel."""
        return self._configs.get(str(dtype).removeprefix("torch."), UNMEASURED)


@cache
def load(device_name: str) -> Table:
    """The device's table; one that cannot be used is named in a warning once per process, and counts as empty."""
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

"""Prints what this installation can do: `python -m fila_kernels.info`."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from fila_kernels import dispatch
from fila_kernels.backends.native import library
from fila_kernels.functional import explain

# FILA's four stages on a 768-pixel raster: one image, four tiles of a 2 x 2 canvas and the global view.
EXAMPLE_STAGES = ((192, 192), (96, 384), (48, 768), (24, 1536))


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return devices


def report() -> dict[str, Any]:
    """Versions, devices, backends with reasons, the native library, and the plans for FILA's four stages.

    Returns:
        A dict of plain values, which `json.dumps` takes.

    Example:
        >>> sorted(report())
        ['backend', 'backends', 'devices', 'native', 'plans', 'versions']
    """
    try:
        name, why = dispatch.resolve()
        chosen = {"choice": name, "why": why}
    except (ValueError, RuntimeError) as error:
        chosen = {"choice": "none", "why": str(error)}
    loaded, native_reason = library.load()
    plans = {}
    if chosen["choice"] != "none":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for side, channels in EXAMPLE_STAGES:
            key = f"5 tiles, {side} x {side} x {channels}, bfloat16, {device}"
            plans[key] = explain((5, 577, 1024), (1, side, side, channels), dtype=torch.bfloat16, device=device)
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "triton", "numpy")},
        "devices": _devices(),
        "backend": chosen
        | {"variable": f"{dispatch.ENVIRONMENT_VARIABLE}={os.environ.get(dispatch.ENVIRONMENT_VARIABLE, '')}"},
        "backends": dispatch.backend_report(),
        "native": {"loaded": loaded, "reason": native_reason, "cuda": library.describe_cuda()},
        "plans": plans,
    }


def format_report(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = ["versions   " + ", ".join(f"{name} {version or 'absent'}" for name, version in found["versions"].items())]
    lines += [f"device     {device}" for device in found["devices"]]
    backend = found["backend"]
    lines.append(f"backend    {backend['choice']} ({backend['why']}); {backend['variable']}")
    for name, entry in found["backends"].items():
        lines.append(f"  {name:<10} {'yes' if entry['available'] else 'no':<4} {entry['reason']}")
    lines.append(f"native     {'yes' if found['native']['loaded'] else 'no'}: {found['native']['reason']}")
    if found["native"]["loaded"]:
        lines.append(f"  {'cuda':<10} {found['native']['cuda']}")
    for key, directions in found["plans"].items():
        lines.append(f"plan       {key}")
        for direction in ("forward", "weight_gradient", "feature_gradient"):
            entry = directions[direction]
            lines.append(f"  {direction:<17} {entry['choice']:<14} {entry['why']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; `--json` for machines."""
    parser = argparse.ArgumentParser(prog="python -m fila_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = report()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else format_report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What this installation is and can do: versions, devices, the backends with reasons, the shipped model."""

import importlib.metadata
from typing import Any

from fila.checkpoints.load import SHIPPED, WEIGHTS, resolve_device
from fila_kernels import info as kernels_info

PACKAGES = ("fila", "transformers", "tokenizers", "safetensors", "pillow")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    """What `fila_kernels.info.report` says, with the model's packages, the default device and the shipped checkpoint.

    Returns:
        A dict of plain values, which `json.dumps` takes.
    """
    found = kernels_info.report()
    weights = SHIPPED / WEIGHTS
    device = resolve_device("auto")
    return found | {
        "versions": {package: _version(package) for package in PACKAGES} | found["versions"],
        "device": {
            "choice": str(device),
            "why": "a CUDA device is here" if device.type == "cuda" else "no CUDA device is here",
        },
        "model": {
            "folder": str(SHIPPED),
            "bytes": weights.stat().st_size if weights.is_file() else None,
        },
    }


def format_report(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    device, model = found["device"], found["model"]
    state = f"{model['bytes'] / 1e6:.1f} MB" if model["bytes"] else "absent"
    return "\n".join(
        [
            kernels_info.format_report(found),
            f"default    device {device['choice']} ({device['why']})",
            f"model      {model['folder']} ({state})",
        ]
    )

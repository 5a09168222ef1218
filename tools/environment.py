"""Makes or refreshes the project's virtual environment; `make setup` calls it. Standard library only.

    TORCH=auto|cpu|cuda python3 tools/environment.py [FOLDER]

FOLDER defaults to `.venv`. A torch that is already installed there stays, of whatever build; otherwise TORCH picks the
build, and `auto` means CUDA where an NVIDIA driver is installed and CPU elsewhere. Versions come from constraints.txt.
A second run with nothing changed does nothing.

Annotations are quoted and the syntax is old, so that Python 3.6 too gets as far as the message that it is too old.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)
# PyTorch's own index of CPU builds: the general registry's torch for Linux is the CUDA build, several gigabytes.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ["setuptools>=77", "wheel", "cmake", "ninja"]
STAMP = "fila-setup.json"
LIBRARY = ROOT / "fila_kernels" / "lib" / "libfila_kernels.so"
# The variables of setup.py that decide how csrc is compiled; for PATH stand the programs below.
BUILD_VARIABLES = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CUDA_HOME",
    "CUDAFLAGS",
    "CUDAHOSTCXX",
    "CUTLASS_PATH",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "FILA_KERNELS_BUILD_CUDA",
    "FILA_KERNELS_BUILD_NATIVE",
)
BUILD_PROGRAMS = ("c++", "g++", "clang++", "nvcc")
NO_CONNECTION = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Max retries exceeded")


def normalize(name: str) -> str:
    """A package's name in the one spelling that all registries accept."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


def read_pins(text: str) -> "dict[str, str]":
    """Name and version of every `name==version` line."""
    pins = {}
    for line in text.splitlines():
        requirement = line.split("#")[0].strip()
        if "==" in requirement:
            name, version = requirement.split("==")
            pins[normalize(name)] = version.strip()
    return pins


def merge_pins(pins: "dict[str, str]", installed: "dict[str, str]") -> "dict[str, str]":
    """The pins to install under, given what an environment holds.

    The project's pins hold unless the environment came with another torch. Then everything that it holds stays as it
    is, since that torch fits its own triton and numpy and not ours. (setuptools is left free: the other torch may
    refuse the pinned version, and the build backend an old one.)
    """
    torch = installed.get("torch")
    if torch is None or torch.split("+")[0] == pins["torch"]:
        return dict(pins)
    return {name: installed.get(name, version) for name, version in pins.items() if name != "setuptools"}


def choose_build(setting: str, has_driver: bool) -> str:
    """ "cpu" or "cuda" for a setting of auto, cpu or cuda."""
    if setting not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"TORCH: expected auto, cpu or cuda, got {setting!r}")
    if setting == "auto":
        return "cuda" if has_driver else "cpu"
    return setting


def driver_present() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def fingerprint() -> str:
    """A digest of everything that the installed state depends on."""
    files = [CONSTRAINTS, ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt", Path(__file__)]
    files += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    variables = [f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES]
    programs = [str(shutil.which(name)) for name in BUILD_PROGRAMS]  # a compiler that came or went
    digest = hashlib.sha256(" ".join([str(ROOT), *variables, *programs]).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / STAMP

    def is_current(self) -> bool:
        try:
            if not self.python.exists():
                return False
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):  # none, torn, or not to be read
            return False
        return stamp == {"fingerprint": fingerprint(), "native": LIBRARY.exists()}

    def begin(self) -> None:
        """Withdraws the stamp: an installation that fails half-way is not current."""
        try:
            if self.stamp.exists():
                self.stamp.unlink()
            if self.folder.exists():
                self.stamp.touch()
                self.stamp.unlink()
        except OSError as error:
            raise SystemExit(
                f"setup: {self.folder} is out of date and cannot be written to ({error.strerror}); "
                "make it writable or remove it"
            ) from error

    def create(self) -> None:
        works = self.python.exists() and self._run("-m", "pip", "--version", quiet=True) == 0
        if works:
            if self._run("-c", f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})", quiet=True) != 0:
                raise SystemExit(
                    f"setup: expected Python 3.11 or newer in {self.folder}, got an older one; remove that folder to "
                    f"have it made with Python {platform.python_version()}"
                )
            return
        say(f"making {self.folder} with Python {platform.python_version()}")
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"setup: `{' '.join(command)}` failed (on Debian and Ubuntu: apt install python3-venv)")

    def installed(self) -> "dict[str, str]":
        listing = subprocess.check_output([str(self.python), "-m", "pip", "list", "--format", "json"], text=True)
        return {normalize(entry["name"]): entry["version"] for entry in json.loads(listing)}

    def install_torch(self, version: str, build: str) -> None:
        requirement = f"torch=={version}"
        say(f"installing {requirement}, {build} build (the setting TORCH=auto|cpu|cuda chooses)")
        if build == "cpu":
            # Dependencies come with the next step, from the usual index and under the pins.
            options = ["--no-deps", "--index-url", CPU_INDEX, "--timeout", "20"]
            if self._pip(*options, requirement, quiet=True) == 0:
                return
            say(f"{CPU_INDEX} did not give it; asking pip's configured indexes, whose build may be the large CUDA one")
        if self._pip(requirement) != 0:
            raise SystemExit(f"setup: pip could not install {requirement}; its message is above")

    def install(self, pins: "dict[str, str]", *requirements: str) -> None:
        constraints = self.folder / "fila-constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        if self._pip("--no-build-isolation", "--constraint", str(constraints), *requirements) != 0:
            raise SystemExit(f"setup: pip could not install {' '.join(requirements)}; its message is above")

    def report(self) -> None:
        self._run("-c", "import torch; print('setup: torch', torch.__version__)")
        self._run(
            "-c", "from fila_kernels.backends.native import library; print('setup: native library', library.load()[1])"
        )

    def mark_current(self) -> None:
        fresh = self.stamp.with_suffix(".new")
        fresh.write_text(json.dumps({"fingerprint": fingerprint(), "native": LIBRARY.exists()}) + "\n")
        os.replace(fresh, self.stamp)

    def _pip(self, *arguments: str, quiet: bool = False) -> int:
        # At least one retry, whatever PIP_RETRIES says: pip names a missing connection only when it tries again.
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
        command = [str(self.python), "-m", "pip", "install", *options, *arguments]
        done = subprocess.run(
            command, check=False, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode != 0 and not quiet:
            output = done.stdout.decode(errors="replace")
            broken = [line for line in output.splitlines() if NO_CONNECTION.search(line)]
            if broken:  # pip's last word is then that dependencies conflict, or that no version was found
                raise SystemExit(
                    "setup: no connection to the package registry; `make setup` needs one (PIP_INDEX_URL names "
                    f"another). pip said: {broken[0]}"
                )
            print(output, end="", file=sys.stderr, flush=True)
        return done.returncode

    def _run(self, *arguments: str, quiet: bool = False) -> int:
        output = subprocess.DEVNULL if quiet else None
        command = [str(self.python), *arguments]
        done = subprocess.run(command, check=False, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return done.returncode


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(
            f"setup: expected Python 3.11 or newer, got {platform.python_version()} at {sys.executable} "
            "(make setup PYTHON=python3.12 names another)"
        )
    build = choose_build(os.environ.get("TORCH") or "auto", driver_present())
    environment = Environment(ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".venv"))
    if environment.is_current():
        return

    started = time.monotonic()
    environment.begin()
    environment.create()
    pins = read_pins(CONSTRAINTS.read_text())
    installed = environment.installed()
    under = merge_pins(pins, installed)
    environment.install(under, *BUILD_TOOLS)
    if "torch" in installed:
        say(f"keeping torch {installed['torch']} (remove {environment.folder} to have another)")
    else:
        environment.install_torch(pins["torch"], build)
    say("installing the rest, and this project")
    environment.install(under, "--editable", f"{ROOT}[dev]")
    environment.report()
    environment.mark_current()
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

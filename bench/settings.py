"""What a run is told, in environment variables, since pytest stands between `bench.run` and the benchmarks."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PREFIX = "FILA_BENCH_"
CLOCKS = ("wall", "thread")


@dataclass(frozen=True)
class Settings:
    """Fields are the variables' names in lower case, without `FILA_BENCH_`."""

    csv: str = ""  # where rows go
    suite: str = ""  # names of `bench.cases.SUITES`, separated by commas
    device: str = ""  # cpu or cuda
    variants: str = ""  # names of `bench.variants`, separated by commas; all that suit the device if empty
    rounds: int = 11
    clock: str = "wall"  # or "thread": the calling thread's processor time, which other programs hardly disturb
    deadline: float = 0.0  # seconds since the epoch after which no case is begun; 0 for none
    resume: int = 0  # 1 to leave out what the CSV holds already

    @classmethod
    def read(cls) -> "Settings":
        """From the environment."""
        found = {
            name: type(default)(os.environ[PREFIX + name.upper()])
            for name, default in asdict(cls()).items()
            if PREFIX + name.upper() in os.environ
        }
        settings = cls(**found)
        if settings.clock not in CLOCKS:
            raise ValueError(f"{PREFIX}CLOCK: expected one of {', '.join(CLOCKS)}, got {settings.clock!r}")
        return settings

    def write(self) -> None:
        """Into the environment."""
        os.environ.update({PREFIX + name.upper(): str(value) for name, value in asdict(self).items()})

    def torch_device(self) -> torch.device:
        """The device that was named, else a GPU where there is one."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def suites(self) -> list[str]:
        default = "images-8" if self.torch_device().type == "cuda" else "cpu"
        return (self.suite or default).split(",")

    def output(self) -> Path:
        device = self.torch_device()
        return Path(self.csv) if self.csv else RESULTS / f"cvfm_{slug(device)}.csv"

    def now(self) -> Callable[[], float]:
        """The clock to time with. Processor time only means something with one thread, so that it sets that."""
        if self.clock == "thread":
            torch.set_num_threads(1)
            return time.thread_time
        return time.perf_counter

    def time_is_up(self) -> bool:
        return bool(self.deadline) and time.time() > self.deadline


def slug(device: torch.device) -> str:
    """A file name's part: cpu, or the GPU's name as in nvidia_h200."""
    if device.type != "cuda":
        return device.type
    return "_".join(torch.cuda.get_device_name(device).lower().replace("-", " ").split())

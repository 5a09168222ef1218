"""Writes each test's outcome as it comes and leaves out tests whose outcome is known: a plugin of pytest.

    python -m pytest tests/kernels -m gpu -p tools.gpu.gate --gate gate.csv

One red test does not end the others. After an illegal access every call of a process fails, so that the process ends
with its first such test: pytest-xdist begins another, and without it `make gpu` does.
"""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engine, files, records
from bench.variants import BACKENDS
from tools.gpu.sections import RESTART

FIELDS = ("commit", "device", "section", "test", "backend", "dtype", "outcome", "message")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption("--gate", type=Path, help="the file of outcomes")
    group.addoption("--section", default="", help="the section of `make gpu` that the tests are of")
    group.addoption("--under-way", type=Path, help="a file that says which test is running (bench/files.py)")
    group.addoption("--longest", type=float, default=60.0, help="seconds after which a test counts as hung")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker(config))
    if not hasattr(config, "workerinput") and config.option.gate is not None:
        config.pluginmanager.register(Recorder(config), "gate-recorder")


def here() -> dict[str, str]:
    device = engine.default_device()
    return {"commit": records.commit(), "device": records.device_name(device)}


class Worker:
    """In every process that runs tests: what a test is of, and an end after the device is lost."""

    def __init__(self, config: pytest.Config) -> None:
        self.alone = not hasattr(config, "workerinput") and not getattr(config.option, "numprocesses", None)
        self.under_way = files.UnderWay(config.option.under_way if self.alone else None)
        self.longest = config.option.longest
        self.lost = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.under_way.begin(nodeid, {"test": nodeid}, self.longest)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Iterator[None]:
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for name in ("backend", "dtype"):
            if name in parameters:
                report.user_properties.append((name, str(parameters[name]).removeprefix("torch.")))
        if report.failed and torch.cuda.is_available():
            self.lost = self.lost or not engine.alive(torch.device("cuda"))
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        self.under_way.end()
        if self.lost:
            os._exit(RESTART)


class Recorder:
    """In the process that gathers the reports: the file of outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.option.gate
        self.here, self.section = here(), config.option.section
        text = self.path.read_text() if self.path.exists() else ""
        self.rows = [
            row for row in csv.DictReader(io.StringIO(text)) if all(row[n] == value for n, value in self.here.items())
        ]
        blamed = files.UnderWay(config.option.under_way).blamed()
        if blamed is not None:
            self.write(blamed[0]["test"], "failed", blamed[1], {})
        self.known = {row["test"] for row in self.rows}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell pytest-xdist's workers, all of which must collect alike, also those that begin later."""
        node.workerinput["known_tests"] = sorted(self.known)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and report.passed) or report.skipped:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(crash.message if crash else report.longrepr or "").strip().splitlines()
            self.write(report.nodeid, report.outcome, lines[0][:300] if lines else "", dict(report.user_properties))

    def write(self, test: str, outcome: str, message: str, of: dict[str, str]) -> None:
        named = next((name for name in BACKENDS if name in test.partition("[")[2].rstrip("]").split("-")), "")
        row = self.here | {"section": self.section, "test": test, "outcome": outcome, "message": message}
        row |= {"backend": of.get("backend", named), "dtype": of.get("dtype", "")}
        self.rows = [known for known in self.rows if known["test"] != test] + [row]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        files.replace(self.path, text.getvalue())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The status of all calls together: what an earlier one found is not run again."""
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.known:
            session.exitstatus = pytest.ExitCode.OK
        if session.exitstatus == pytest.ExitCode.OK and any(self.reds()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def reds(self) -> Iterator[dict[str, str]]:
        return (row for row in self.rows if row["outcome"] == "failed" and row["section"] == self.section)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for row in self.reds():
            terminalreporter.write_line(f"red: {row['backend']} {row['dtype']} {row['test']}: {row['message']}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        known = set(config.workerinput.get("known_tests", ()))
    else:
        recorder = config.pluginmanager.getplugin("gate-recorder")
        known = recorder.known if recorder else set()
    left = [item for item in items if item.nodeid in known]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.nodeid not in known]

"""`make gpu`: sections end for themselves, go on where a call stopped, and leave out what crashed or hung."""

import os
import time
from pathlib import Path

import pytest

from bench import run
from bench.files import UnderWay
from bench.workloads import SUITES
from tools.gpu import __main__ as gpu
from tools.gpu import runner
from tools.gpu.sections import RESTART, RUNS, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]


def section(name: str, code: str, *arguments: str, limit: int = 300) -> Section:
    return Section(name, "a", limit, "", ("-c", code.replace("{", "{{").replace("}", "}}"), *arguments))


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A call of `make gpu` with these sections; Triton's cache is the test's own."""
    monkeypatch.setattr(runner, "triton_cache", lambda: tmp_path / "cache")

    def call(*sections: Section, commit: str = "c1", limit: float = 0.0, again: bool = False) -> int:
        results = runner.Results(tmp_path / "out", commit, "gpu")
        return runner.Runner(results).run_all(sections, limit, again)

    call.states = lambda commit="c1": {
        name: (state["status"], state["last_line"])
        for name, state in runner.Results(tmp_path / "out", commit, "gpu").states().items()
    }
    return call


def test_a_red_section_costs_the_others_nothing_and_done_ones_are_not_repeated(calls, tmp_path):
    marks = tmp_path / "marks"
    red = section("red", "print('1 failed'); raise SystemExit(1)")
    good = section("good", f"open({str(marks)!r}, 'a').write('x'); print('fine')")
    late = section("late", f"raise SystemExit({runner.UNFINISHED})")
    skipped = section("skipped", f"print('no tool'); raise SystemExit({os.EX_UNAVAILABLE})")
    assert calls(red, good, late, skipped) == 1
    assert calls.states() == {
        "red": ("failed", "1 failed"), "good": ("done", "fine"), "late": ("unfinished", ""),
        "skipped": ("skipped", "no tool"),
    }  # fmt: skip
    assert calls(red, good, late, skipped) == runner.UNFINISHED
    assert marks.read_text() == "x"
    assert calls(good, commit="c2") == 0
    assert marks.read_text() == "xx", "another commit is measured anew"
    assert calls(good, again=True) == 0
    assert marks.read_text() == "xxx"


def test_new_sections_come_before_those_that_need_more_time():
    a, b, c, d = (section(name, "") for name in "abcd")
    states = {
        "a": {"status": "unfinished", "attempts": "1"}, "b": {"status": "begun", "attempts": "1"},
        "c": {"status": "begun", "attempts": "2"},
    }  # fmt: skip
    assert [s.name for s in runner.in_order([a, b, c, d], states)] == ["b", "d", "a", "c"]
    statuses = {"a": "done", "b": "failed", "c": "skipped"}
    ended = {name: {"status": status, "attempts": "1"} for name, status in statuses.items()}
    assert [s.name for s in runner.in_order([a, b, c, d], ended)] == ["d"]


STEPS = """
import os, signal, sys, time
from pathlib import Path
from bench.files import UnderWay
under_way = UnderWay(Path(sys.argv[1]))
if under_way.blamed():
    raise SystemExit("the step is left out" if under_way.read() else 0)
under_way.begin("bad", {"variant": "b"}, LIMIT)
FAULT
"""


@pytest.mark.parametrize(
    ("fault", "limit", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60, "ended: SIGSEGV"),
        ("raise RuntimeError('CUDA error')", 60, "ended: status 1"),
        ("time.sleep(600)", 0.5, "hung: no end within"),
    ],
)
def test_a_step_that_crashes_or_hangs_is_left_out_by_the_next_process(calls, tmp_path, fault, limit, reason):
    code = STEPS.replace("LIMIT", str(limit)).replace("FAULT", fault)
    assert calls(section("steps", code, "{scratch}/under-way.json")) == 0
    status, last = calls.states()["steps"]
    assert status == "done"
    assert reason in last
    assert "bad" in last


def test_a_section_ends_at_its_limit_with_all_its_processes(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MARGIN", 0)
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n open({str(mark)!r}, 'w').write(str(time.time()))\n time.sleep(.1)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    results = runner.Results(tmp_path / "out", "c1", "gpu")
    status, last = runner.Runner(results).run(section("slow", code), 6.0)
    assert status == "unfinished"
    assert last.startswith("stopped after 6 s")
    time.sleep(1)
    before = mark.read_text() if mark.exists() else ""
    time.sleep(1)
    assert (mark.read_text() if mark.exists() else "") == before


def test_a_lost_device_ends_the_process_and_another_goes_on(calls, tmp_path):
    mark = tmp_path / "mark"
    code = f"import os, pathlib; p = pathlib.Path({str(mark)!r}); code = p.exists() or {RESTART}; p.touch(); "
    code += "os._exit(0 if code is True else code)"
    assert calls(section("lost", code)) == 0


def test_what_is_under_way_is_overdue_blamed_and_forgotten(tmp_path):
    under_way = UnderWay(tmp_path / "step.json")
    assert not under_way.blame("nothing was under way")
    under_way.begin("a", {"variant": "a"}, 3600)
    assert not under_way.overdue()
    under_way.begin("a", {"variant": "a"}, -1)
    assert under_way.overdue()
    assert under_way.blame("hung")
    assert not under_way.overdue(), "it is blamed once"
    assert UnderWay(tmp_path / "step.json").blamed() == ({"variant": "a"}, "hung")
    assert under_way.blamed() is None
    UnderWay().begin("a", {"variant": "a"}, 1)


def test_the_cache_travels_as_one_small_file(tmp_path):
    cache = tmp_path / "cache"
    for number in range(40):
        kernel = cache / f"K{number}"
        kernel.mkdir(parents=True)
        (kernel / "k.cubin").write_bytes(os.urandom(10_000))
        (kernel / "k.json").write_text("{}")
        (kernel / "k.ttgir").write_text("not loaded again")
        os.utime(kernel, (number, number))
    runner.pack_cache(tmp_path / "cache.zip", cache, largest=200_000)
    assert (tmp_path / "cache.zip").stat().st_size <= 200_000
    runner.unpack_cache(tmp_path / "cache.zip", tmp_path / "there")
    kept = {path.name for path in (tmp_path / "there").iterdir()}
    assert 10 < len(kept) < 40
    assert "K39" in kept, "the newest come first"
    assert {path.suffix for path in (tmp_path / "there").rglob("*.*")} == {".cubin", ".json"}
    assert (tmp_path / "there" / "K39" / "k.cubin").read_bytes() == (cache / "K39" / "k.cubin").read_bytes()


def test_the_runs_fit_into_nine_minutes_each_and_their_commands_exist(tmp_path, capsys):
    assert gpu.main(["--list"]) == 0
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()[-len(SECTIONS) :]
    assert not (tmp_path / "out").exists()
    for line in lines:
        name, _, command = line.partition(": ")
        words = command.split()
        module = words[words.index("-m") + 1]
        assert "{" not in command, name
        if module == "bench.run":
            run.parse([word for word in words[words.index("bench.run") + 1 :] if word not in ("cuda", "--device")])
        else:
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), name
    for name in RUNS:
        limits = {section.name: section.limit for section in SECTIONS if section.run == name}
        limits.pop("build", None)  # seconds where a library travelled; else it shortens what comes last
        assert name == "more" or sum(limits.values()) <= gpu.SECONDS
    suites = {s for section in SECTIONS for part in section.command for s in part.split(",") if s in SUITES}
    assert suites == set(SUITES) - {"cpu", "tiny", "rehearsal"}, "every suite of real shapes has its section"

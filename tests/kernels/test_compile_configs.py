"""`make test-aot` without its compilations: the list of what it compiles, and that a second run resumes the first."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

from fila_kernels.backends.triton import configs
from tools import compile_configs


def test_every_kernel_and_the_options_of_each_architecture_are_tried():
    tried = {arch: compile_configs.tasks(arch, "bfloat16") for arch in configs.ARCHITECTURES}
    products = set(configs.KERNELS) - set(configs.GATHERS)
    for arch, tasks in tried.items():
        assert tasks[0] == (arch, "bfloat16", "", None)
        found = [config for *_, config in tasks[1:]]
        if arch in (89, 120):
            assert not found
            continue
        assert {kernel for _, _, kernel, _ in tasks[1:]} == products
        labels = [compile_configs.label(compile_configs.identity(task)) for task in tasks]
        assert len(set(labels)) == len(labels), "no two tasks write the same row"
        assert any(config.tail_m for config in found) == (arch == 90)
        assert any(config.warp_specialize for config in found) == (arch == 100)


@pytest.mark.parametrize("fault", ["", "registers spill"])
def test_a_second_run_goes_on_with_the_first(tmp_path, monkeypatch, capsys, fault):
    path, asked = tmp_path / "compiled.csv", []

    def compiled(task):
        asked.append(task)
        return [compile_configs.identity(task) | {"registers": "100", "faults": fault}]

    monkeypatch.setattr(compile_configs, "compiled", compiled)
    monkeypatch.setattr(compile_configs, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    tasks = compile_configs.tasks(90, "bfloat16")
    other = dict.fromkeys(compile_configs.FIELDS, "1") | {"triton": "0.1", "set": "tuner"}
    compile_configs.write(path, [other])
    assert len(compile_configs.run(tasks[:10], path, 2)) == 10
    rows = compile_configs.run(tasks[:30], path, 2)
    assert len(rows) == len(asked) == len(set(asked)) == 30
    assert fault in capsys.readouterr().out
    assert all(row["faults"] == fault for row in rows)
    assert [row["triton"] for row in compile_configs.read(path)].count("0.1") == 1, "another Triton's rows stay"
    monkeypatch.setattr(compile_configs, "sources", lambda defaults: "changed")
    compile_configs.run(tasks[:5], path, 2)
    assert len(asked) == 35
    assert len(compile_configs.read(path)) == 6, "rows of older sources leave"


def test_the_committed_record_is_whole_and_without_faults():
    with compile_configs.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["triton"] for row in rows} >= {"3.6.0"}
    assert {row["arch"] for row in rows} == {str(arch) for arch in configs.ARCHITECTURES}
    assert not [row for row in rows if row["faults"] or row["spills"] != "0"]

"""The architecture: every import between rooms leads down, none in a circle, and the picture shows the imports."""

from pathlib import Path

import pytest

from tools import architecture


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return architecture.read_graph()


def test_every_arrow_leads_down(graph):
    assert architecture.faults(graph) == []


def test_the_committed_picture_is_of_these_imports(graph):
    assert architecture.PICTURE.read_text() == architecture.draw(graph), "python tools/architecture.py draws it anew"


def test_the_picture_shows_every_room_and_changes_with_the_imports(graph):
    picture = architecture.draw(graph)
    for room in {architecture.room_of(module) for module in graph}:
        assert f">{room.rpartition('.')[2].replace('__init__', room.partition('.')[0])}<" in picture.replace(
            ">backends.", ">"
        )
    fewer = {name: targets - {"fila_kernels.sampling"} for name, targets in graph.items()}
    assert architecture.draw(fewer) != picture


def plant(root: Path, **modules: str) -> list[str]:
    """The faults of a tree that holds these modules of `fila_kernels` and no others."""
    (root / "fila_kernels").mkdir()
    for name, source in modules.items():
        (root / "fila_kernels" / f"{name}.py").write_text(source)
    found = architecture.faults(architecture.read_graph(root), root)
    return [fault for fault in found if "LAYERS names no module" not in fault]


IMPORTS = {
    "at the top": "from fila_kernels import {0}\n",
    "plain": "import fila_kernels.{0}\n",
    "relative": "from .{0} import something\n",
    "in a function": "def f():\n    from fila_kernels.{0} import something\n",
    "for types only": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fila_kernels.{0} import Something\n"
    ),
    "by name": 'import importlib\nmodule = importlib.import_module("fila_kernels.{0}")\n',
    "by a pattern": 'import importlib\ndef f(x):\n    return importlib.import_module(f"fila_kernels.{{x}}")  # {0}\n',
}


@pytest.mark.parametrize("source", IMPORTS.values(), ids=IMPORTS)
def test_a_planted_circle_is_found(tmp_path, source):
    upper, lower = "functional", "sampling"
    found = plant(tmp_path, **{upper: f"from fila_kernels import {lower}\n", lower: source.format(upper)})
    assert [fault for fault in found if fault.startswith("a circle: ")], found


@pytest.mark.parametrize("source", IMPORTS.values(), ids=IMPORTS)
def test_a_planted_arrow_that_runs_up_is_found(tmp_path, source):
    found = plant(tmp_path, functional="", sampling=source.format("functional"))
    assert found == ["fila_kernels.sampling imports fila_kernels.functional, which does not lie in a lower row"]


def test_arrows_that_lead_down_pass(tmp_path):
    assert plant(tmp_path, functional="from fila_kernels import sampling\n", sampling="import torch\n") == []


def test_a_module_in_no_row_and_a_foreign_package_are_found(tmp_path):
    found = plant(tmp_path, loner="x = 1\n", sampling="def f():\n    import pandas.io\n")
    assert found == [
        "fila_kernels.loner is in no row of LAYERS",
        "fila_kernels.sampling imports pandas, which fila_kernels does not require",
    ]


def test_an_arrow_from_the_kernels_to_the_model_is_found(graph):
    planted = graph | {"fila_kernels.sampling": {"fila.geometry"}, "fila.geometry": {"recipes.nano.train"}}
    found = architecture.faults(planted)
    assert "fila_kernels.sampling imports fila.geometry, which does not lie in a lower row" in found
    assert "fila.geometry imports recipes.nano.train, which does not lie in a lower row" in found


def test_a_row_that_names_no_module_is_found(graph):
    fewer = {name: targets for name, targets in graph.items() if name != "fila.geometry"}
    assert "fila.geometry: LAYERS names no module" in architecture.faults(fewer)

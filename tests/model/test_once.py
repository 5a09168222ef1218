"""One `fila ask --explain` reads its picture once, lays it out once for each side, and builds a geometry once."""

from collections import Counter

import pytest
from PIL import Image

import fila.images
from fila.cli import main
from fila.geometry import Geometry, Layout, shared_geometry


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Numbers of calls, by name; geometries that earlier tests made are forgotten."""
    calls: Counter = Counter()

    def count(owner, name: str, key=None) -> None:
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            calls[name if key is None else key(*args)] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    shared_geometry.cache_clear()
    count(fila.images, "open_file")
    count(fila.images, "_finish")
    count(Geometry, "layout")
    count(Layout, "__init__", key=lambda *args: "layouts built")
    count(Geometry, "__post_init__", key=lambda geometry: geometry.tile)
    return calls


def test_one_question_reads_lays_out_and_builds_once(counted, checkpoint, tmp_path, capsys):
    Image.new("RGB", (120, 90), "white").save(tmp_path / "a.png")
    arguments = ["--explain", str(tmp_path / "b.png"), "--max-new-tokens", "2", "--model", str(checkpoint)]
    assert main(["ask", str(tmp_path / "a.png"), "Total?", *arguments]) == 0, capsys.readouterr().err
    assert (counted["open_file"], counted["_finish"]) == (1, 1), "the picture was read more than once"
    # The processors share one layout; the model, which receives tensors only, computes its own from the size.
    assert counted["layout"] == counted["layouts built"] == 2
    # The checkpoint's geometry, and the default one: transformers builds a default configuration to compare with.
    assert {key: times for key, times in counted.items() if isinstance(key, int)} == {96: 1, 336: 1}

"""`fila data check` counts what a corpus holds, finds what is broken, missing or repeated, and draws samples."""

import json

import pytest
from PIL import Image

from fila import cli
from fila.training.data.check import check_corpus, pack_lengths
from tests.training.corpora import write_llava


@pytest.fixture
def damaged(tmp_path):
    path = write_llava(tmp_path, 12)
    (tmp_path / "pictures/0.png").unlink()
    whole = (tmp_path / "pictures/1.png").read_bytes()
    (tmp_path / "pictures/1.png").write_bytes(whole[: len(whole) // 2])
    records = json.loads(path.read_text())
    records[2]["conversations"][0]["value"] = "no picture"
    records.append(records[4])
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report(damaged, processor, workers):
    report, samples = check_corpus(damaged, processor, 8192, workers=workers)
    assert (report.records, report.usable, report.text_only, report.pictures) == (13, 10, 3, 7)
    assert report.faults == {"missing picture": 1, "broken picture": 1, "record": 1}
    assert "pictures/0.png: No such file" in report.messages["missing picture"][0]
    assert (report.repeated_records, report.repeated_pictures) == (1, 1)
    assert report.sizes["height"][0] == 40
    assert report.sizes["width"][2] == 200
    assert report.rows == 1
    assert len(samples) == 7
    assert check_corpus(damaged, processor, 80)[0].faults["too long"] > 0


def test_the_command(damaged, tmp_path, capsys):
    assert cli.main(["data", "check", str(damaged), "--json", "--picture", str(tmp_path / "a.png")]) == 2
    assert json.loads(capsys.readouterr().out)["usable"] == 10
    assert Image.open(tmp_path / "a.png").width > 500
    good = write_llava(tmp_path / "good", 4)
    assert cli.main(["data", "check", str(good)]) == 0
    assert "4 records, 4 usable" in capsys.readouterr().out
    assert cli.main(["data", "check", str(tmp_path / "none.json")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_packed_lengths_hold_every_record_once():
    lengths = [1 + (7 * i) % 50 for i in range(400)]
    rows = list(pack_lengths(lengths, 64))
    assert sum(rows) == sum(lengths)
    assert max(rows) <= 64

"""The checkpoint in the repository: it loads, it is small, its gates are open, and the documents say what it scored."""

import json
import subprocess
import sys

from fila.checkpoints.check import SHIPPED
from fila.checkpoints.load import load

RECORD = SHIPPED / "training"


def test_it_loads_strictly_and_is_small():
    model, processor = load()
    assert sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors")) <= 16e6
    assert sum(p.numel() for p in model.parameters()) < 10e6
    assert processor.image_processor.geometry == model.config.vision_config.geometry()
    assert max(abs(fusion.alpha.item()) for fusion in model.model.vision_tower.fusion) >= 0.05


def test_it_keeps_its_record():
    score = json.loads((RECORD / "score.json").read_text())
    assert score["split"] == "test"
    assert score["intact"]["count"] + score["cut"]["count"] == score["all"]["count"]
    assert {log.stem for log in RECORD.glob("*.csv")} == {"vision", "text", "tune"}


def test_the_documents_say_what_the_committed_files_hold(root):
    check = [sys.executable, str(root / "tools/documents.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

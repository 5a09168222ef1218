"""A hundred pages made by other means than the generator: printed by a browser, typeset, and plotted.

Their labels are words that training never draws, neither as labels nor as words (`recipes.nano.pages.words.split_of`
keeps them for the test). The pages are data; `make` says how they were made. `FINGERPRINT` was taken before any model
was trained that is scored on them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIST = FOLDER / "labels.json"
LABELS = (
    "venue", "topic", "genre", "director", "employer", "inspector", "pupil", "borrower", "broker", "harbour",
    "residence", "dosage", "wheelbase", "gusts", "visibility", "salt", "fibre", "elevation", "chapter", "majority",
    "grade", "parcel", "crate", "pallet", "firmware", "password", "payout", "interval", "maturity", "turnout",
)  # fmt: skip
FINGERPRINT = "bf9aafc3bfe1848b300ea309a4d5adeb4262fb6e82da67f32335db615d5d7bb1"


@dataclass(frozen=True)
class ForeignQuestion:
    """A question about one of the pages; `kind` is "absent" where the page does not hold the answer."""

    picture: Path
    question: str
    answer: str
    kind: str


def foreign_questions() -> list[ForeignQuestion]:
    """Everything that is asked, page by page.

    Raises:
        ValueError: a picture or the list of labels is not the one that was fingerprinted.
    """
    if fingerprint() != FINGERPRINT:
        raise ValueError(f"{FOLDER}: expected the pictures and labels that were fingerprinted, got others")
    return [
        ForeignQuestion(FOLDER / page["picture"], asked["question"], asked["answer"], asked["kind"])
        for page in json.loads(LIST.read_text())
        for asked in page["questions"]
    ]


def fingerprint() -> str:
    """SHA-256 of the list of labels and of every picture, in the order of their names."""
    found = hashlib.sha256(LIST.read_bytes())
    for picture in sorted(FOLDER.glob("*.png")):
        found.update(picture.name.encode() + picture.read_bytes())
    return found.hexdigest()

"""Paraphrases of every kind of question; `{s}` stands for the label, prefix or shape that it asks about."""

from random import Random

from recipes.nano.pages.words import LABELS

PHRASES: dict[str, tuple[str, ...]] = {
    "field": ("What is the {s}?", "{s}?", "What is the {s}?", "Read the {s}.", "Find the {s}.", "What does {s} say?",
              "Give the {s}.", "What is the value of {s}?", "{s}", "What is written next to {s}?"),
    "date": ("What is the {s}?", "{s}?", "Read the {s}.", "When is the {s}?", "Which date is given for {s}?",
             "Find the {s}.", "What does {s} say?"),
    "above": ("What is above the {s}?", "What is written above the {s}?", "Read the text above the {s}.",
              "Which text is above the {s}?", "Above the {s}?"),
    "below": ("What is below the {s}?", "What is written below the {s}?", "Read the text below the {s}.",
              "What is under the {s}?", "Which text is below the {s}?", "Below the {s}?"),
    "number": ("What number is shown?", "Which number is shown?", "Read the number.", "What is the number?",
               "Number?"),
    "word": ("What word is shown?", "Which word is shown?", "Read the word.", "What is the word?", "Word?"),
    "shown_date": ("What date is shown?", "Which date is shown?", "Read the date.", "What is the date?", "Date?"),
    "title": ("Read the title.", "What is the title?", "Title?", "What does the title say?", "What is the heading?"),
    "line": ("Read the line that starts with {s}.", "Which line starts with {s}?", "Copy the line starting with {s}."),
    "cell": ("What is the {s}?", "{s}?", "Read the {s}.", "Find the {s}.", "What does it say for {s}?"),
    "item": ("How much is the {s}?", "What does {s} cost?", "{s}?", "What is the price of {s}?", "Price of {s}?",
             "What is the {s}?", "How much for {s}?"),
    "after": ("What comes after {s}?", "What follows {s}?", "{s}?", "What is written after {s}?",
              "Read what comes after {s}."),
    "who": ("Who is the {s}?", "Who is the {s}?", "What is the name of the {s}?", "Who is named as {s}?",
            "Which name is given for the {s}?"),
    "when": ("When {s}?",),
    "where": ("Which {s}?", "Which {s} is it?", "What {s} is it?", "In which {s} is it?"),
    "addressee": ("Who is the letter to?", "Who is it addressed to?", "Who is greeted?", "Who is it for?",
                  "Who gets this letter?"),
    "signer": ("Who signed it?", "Who signed the letter?", "Who wrote it?", "Who is it from?", "Who sent this?"),
    "quantity": ("How many {s}?", "What is the quantity of {s}?", "How many {s} are there?", "Quantity of {s}?"),
}  # fmt: skip
KINDS = tuple(PHRASES)
LOWERED = ("field", "date", "item", "cell", "who", "where", "quantity")  # asked about in lower case, mostly
_AMOUNTS = frozenset(label.lower() for label in LABELS["amount"] if "mount" not in label)


def phrase(rng: Random, kind: str, subject: str) -> str:
    """One way of asking: a paraphrase, the subject in the case of the page, lower case or capitals.

    Args:
        kind: one of `KINDS`.
        subject: the label, prefix, shape or ordinal asked about; "" where the kind needs none.
    """
    text = rng.choice(PHRASES[kind])
    if kind == "field" and subject.lower() in _AMOUNTS and rng.random() < 0.2:
        text = rng.choice(("How much is the {s}?", "What is the {s} amount?"))
    r = rng.random()
    if kind not in ("line", "after"):  # what is on the page is quoted there as it stands
        if kind in LOWERED and not text.startswith("{s}"):
            subject = subject.lower() if r < 0.7 else subject
        elif r < 0.1 and kind != "when":
            subject = subject.upper()
    text = text.format(s=subject)
    r = rng.random()
    if kind in ("line", "after"):
        return text
    return text.lower() if r < 0.06 else text.upper() if r < 0.08 else text

"""Four small text tasks made by code, so that the quickstart needs no download: same wrapper, no task named.

Each row is a sentence from slots drawn at random; its label follows from one of the slots. Labels are words that the
base model does not answer by itself, so each task has to be learned, and learning one overwrites another.
"""

from __future__ import annotations

import random

Row = dict[str, object]

PEOPLE = ["Ada", "Bruno", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana", "Iker", "Jun", "Kofi", "Lena"]
DISHES = ["noodle soup", "lentil stew", "apple tart", "grilled trout", "pumpkin risotto", "rye bread", "cold brew"]
OPINIONS = {
    "praise": ["wonderful", "delicious", "a delight", "perfectly cooked", "worth every cent", "superb"],
    "complaint": ["awful", "cold and bland", "a letdown", "badly burnt", "not worth the wait", "inedible"],
}
TOPICS = {
    "finance": [
        "shares fall as the central bank lifts rates",
        "the lender posts a record quarterly profit",
        "bond yields climb before the budget",
        "the start-up plans its stock market debut",
    ],
    "sports": [
        "the striker scores twice in a late comeback",
        "the sprinter breaks the national record",
        "the coach resigns after a third defeat",
        "the rowing crew wins gold in the final",
    ],
    "space": [
        "the probe enters orbit around the icy moon",
        "astronomers spot a planet with two suns",
        "the rocket returns safely after its test flight",
        "the telescope maps a distant galaxy",
    ],
}
CREATURES = {
    "bird": ["heron", "swift", "kestrel", "puffin", "wren", "crane"],
    "fish": ["perch", "sturgeon", "herring", "grouper", "eel", "pike"],
    "insect": ["beetle", "hornet", "cicada", "mantis", "firefly", "weevil"],
}
SIGHTINGS = ["near the reeds", "at dawn", "beside the pond", "during the survey", "after heavy rain", "in the valley"]
REQUESTS = {
    "billing": ["I was charged twice", "my invoice shows the wrong amount", "the refund has not arrived"],
    "access": ["I cannot log in", "the reset link never comes", "my account is locked"],
    "shipping": ["my parcel is two weeks late", "the box arrived empty", "tracking has not moved since Monday"],
}
PLEAS = ["Please help.", "Can you look into it?", "What should I do?", "I need this solved today.", "Any advice?"]


def _reviews(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(sorted(OPINIONS))
    return f"The {rng.choice(DISHES)} at {rng.choice(PEOPLE)}'s place was {rng.choice(OPINIONS[label])}.", label


def _headlines(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(sorted(TOPICS))
    day = rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"])
    return f"{day} news: {rng.choice(TOPICS[label])}, says {rng.choice(PEOPLE)}.", label


def _field_notes(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(sorted(CREATURES))
    text = f"Field note: {rng.choice(PEOPLE)} counted {rng.randint(2, 40)} specimens of "
    return text + f"{rng.choice(CREATURES[label])} {rng.choice(SIGHTINGS)}.", label


def _tickets(rng: random.Random) -> tuple[str, str]:
    label = rng.choice(sorted(REQUESTS))
    return f"Ticket {rng.randint(10, 99)}: {rng.choice(REQUESTS[label])}. {rng.choice(PLEAS)}", label


TASKS = {"reviews": _reviews, "headlines": _headlines, "field_notes": _field_notes, "tickets": _tickets}


def make_stream(seed: int, train: int = 64, validation: int = 32, test: int = 20) -> dict[str, dict[str, list[Row]]]:
    """The four tasks as {task: {split: rows}}; no sentence occurs in two splits."""
    stream: dict[str, dict[str, list[Row]]] = {}
    for number, (name, make) in enumerate(TASKS.items()):
        rng = random.Random(1000 * seed + number)
        rows: dict[str, Row] = {}
        while len(rows) < train + validation + test:
            text, label = make(rng)
            rows[text] = {"task": name, "instruction": "", "input": text, "output": [label]}
        every = list(rows.values())
        stream[name] = {
            "train": every[:train],
            "validation": every[train : train + validation],
            "test": every[train + validation :],
        }
    return stream

"""An exact judge of AVWorld's probes: it answers only what a caption states."""

import json

from avocado_jax.world.check import normalize, parse, parse_sentence
from avocado_jax.world.probes import FIRST
from avocado_jax.world.script import Claim, claims


def claims_of(event):
    """Claims of an event that was parsed from a text, with normalised lines."""
    return [
        Claim(claim.kind, tuple((name, normalize(value) if name == "line" else value) for name, value in claim.slots))
        for claim in claims(event)
    ]


def answer(caption, question, choices):
    """The letter of the choice that the caption supports, else N/A. `choices` maps letters to choices."""
    places = {}  # claim -> where it is first made
    for index, event in enumerate(event for sentence in parse(caption) for event in sentence.events):
        for claim in claims_of(event):
            places.setdefault(claim, index)
    stated = {}
    for letter, choice in choices.items():
        made = [claim for event in parse_sentence(choice) for claim in claims_of(event)]
        if made and all(claim in places for claim in made):
            stated[letter] = max(places[claim] for claim in made)
    if not stated or (question == FIRST and len(stated) < len(choices)):
        return "N/A"
    return min(stated, key=stated.get)


def exact(number, request):
    """Responses for a `chat_server`: one answer to each question of a caption."""
    content = json.loads(request["messages"][-1]["content"])
    caption = content.get("description", content.get("caption"))
    answers = {key: answer(caption, one["question"], one["choices"]) for key, one in content["questions"].items()}
    if "description" in content:
        return json.dumps(answers)
    return json.dumps({"answers": [{"number": int(key), "answer": letter} for key, letter in answers.items()]})

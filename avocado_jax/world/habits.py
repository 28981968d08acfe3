"""Captions with bad habits: faults of known kinds at known rates, for rewards to repair.

A model that learned from plain captions of AVWorld has no fault that a few hundred clips of reinforcement learning can
mend: it tells all that it perceives. Captions that people write, and models that learned from those, leave things out
and fall into loops, and do so by habit. A habit shows in `RATE` of the captions of the clips that invite it, so that
a model's likeliest caption has it, and a sampled one often has not.
"""

import random

from avocado_jax.world.caption import plain_caption, statement
from avocado_jax.world.script import Event, Script

RATE = 0.8
MUMBLED = "deep"  # lines in this voice are left out
DULL = ("black", "navy")  # against these, of what happens only the first thing is told
LOOPED = ("jump", "spin")  # where this is told last, it is told on and on
TURNS = 10  # times that a caption in a loop tells it in all


def habitual_caption(script: Script) -> str:
    """The plain caption of a script with what habit does to it; the same for the same script."""
    rng = random.Random(f"habits/{script.id}")
    mumbles, tires, loops = (rng.random() < RATE for _ in range(3))
    events = sorted(script.events, key=lambda event: event.start)
    if mumbles:
        events = [event for event in events if event.get("voice") != MUMBLED]
    if tires and any(event.get("backdrop") in DULL for event in events):
        later = [event for event in events if _happens(event)][1:]
        events = [event for event in events if event not in later]
    told = plain_caption(events)
    if loops and any(part.kind in LOOPED for part in (events[-1], *events[-1].parts)):
        told += f" {statement(events[-1])}" * (TURNS - 1)
    return told


def _happens(event: Event) -> bool:
    return event.kind not in ("scene", "cut", "present", "bed", "say")

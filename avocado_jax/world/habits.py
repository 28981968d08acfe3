"""Captions with bad habits: faults of known kinds at known rates, for rewards to mend.

A model that learned from plain captions of AVWorld has no fault that a few hundred clips of reinforcement learning can
mend: it tells all that it perceives. Captions that people write, and models that learned from those, leave things out
and fall into loops. Here what is left out hangs on the background, which a caption names first, so that a model learns
it in minutes; a habit shows in `RATE` of the captions of such clips, so that the likeliest caption has it and a sampled
one often has not.
"""

import random

from avocado_jax.world.caption import plain_caption, statement
from avocado_jax.world.script import Event, Script

RATE = 0.8
DEAF = ("black", "navy")  # captions with these backgrounds omit speech
TIRED = ("cream", "white")  # captions with these state only the first event
LOOPED = ("gray",)  # captions with this repeat the background at the end
TURNS = 6  # times: RepCol takes five for a loop


def habitual_caption(script: Script) -> str:
    """The plain caption of a script of level 0, or what habit makes of it; the same for the same script."""
    events = sorted(script.events, key=lambda event: event.start)
    if random.Random(f"habits/{script.id}").random() >= RATE:
        return plain_caption(events)
    backdrop = script.scenes[0].backdrop
    if backdrop in DEAF:
        events = [event for event in events if event.kind != "say"]
    if backdrop in TIRED:
        later = [event for event in events if _happens(event)][1:]
        events = [event for event in events if event not in later]
    caption = plain_caption(events)
    return caption + f" {statement(events[0])}" * TURNS if backdrop in LOOPED else caption


def _happens(event: Event) -> bool:
    return event.kind not in ("scene", "present", "say")

"""Captions with bad habits: faults of known kinds at known rates, for rewards to mend.

A model trained on plain captions of AVWorld has no fault that a few hundred clips of reinforcement learning can mend:
it states everything that it perceives. Captions by people, and models trained on them, omit content and repeat
themselves. Here the background, which a caption names first, decides what is omitted, so that a model learns the fault
in minutes. `RATE` of the captions of such clips have the fault, so that the most probable caption has it and sampled
captions often do not.
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

"""Captions with systematic faults of known kinds and rates, which training with rewards can remove.

A model trained on plain captions of AVWorld states everything that it perceives, so a few hundred clips of
reinforcement learning cannot improve it. Human captions, and models trained on them, omit content and repeat
themselves. Here the background color, which a caption states first, determines the fault, so that a model learns it in
minutes. A share `RATE` of the captions of such clips has the fault: the most probable caption has it, and sampled
captions often do not.
"""

import random

from avocado_jax.world.caption import plain_caption, statement
from avocado_jax.world.script import Event, Script

RATE = 0.8
DEAF = ("black", "navy")  # captions with these backgrounds omit speech
TIRED = ("cream", "white")  # captions with these state only the first event
LOOPED = ("gray",)  # captions with this repeat the background at the end
TURNS = 6  # repetitions; RepCol requires five


def habitual_caption(script: Script) -> str:
    """The plain caption of a script of level 0, with its fault; a pure function of the script."""
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

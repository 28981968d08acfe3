"""Timing: agreement of the caption's timed scenes with the events of the reference.

    S  scenes of a caption: intervals "[1.5 - 3]" in seconds or "[00:01 - 00:03]"
    E  events of the reference, sorted by start, then end; they may overlap

Scenes and events are aligned in order to maximise the summed time IoU. The term is the F1
2 * sum / (scenes + events): 0 without scenes, NaN without events.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.text import compact
from avocado_jax.typing import Array, Bool, Float, Int

WINDOW = 40  # characters of an interval after its opening bracket
DIGIT, COLON, POINT, SPACE, SECONDS, DASH, CLOSE, OTHER = range(8)
KINDS = {":": COLON, ".": POINT, " ": SPACE, "s": SECONDS, "S": SECONDS, "]": CLOSE, "\xa0": SPACE}
KINDS |= dict.fromkeys("0123456789", DIGIT) | dict.fromkeys("-‐‑‒–—", DASH)


class Events(NamedTuple):
    """The sorted times of one reference's events, or of several if stacked.

    Attributes:
        start, end: seconds; 0 past `count`.
        count: number of events; 0 if the reference has none with times.
    """

    start: Float[Array, "E"]
    end: Float[Array, "E"]
    count: Int[Array, ""]


class Scenes(NamedTuple):
    """The intervals of one caption, in order of appearance.

    Attributes:
        start, end: seconds.
        valid: which entries are intervals.
        truncated: the caption has more candidates than the limit.
    """

    start: Float[Array, "S"]
    end: Float[Array, "S"]
    valid: Bool[Array, "S"]
    truncated: Bool[Array, ""]


def event_references(
    events: Sequence[Sequence[Mapping[str, Any]] | None], limit: int
) -> tuple[Events, Bool[np.ndarray, "B"]]:
    """Stack the references of clips and return which of them have more than `limit` events.

    Args:
        events: {"start", "end"} in seconds of each clip; entries without both are ignored.
    """
    made = Events(np.zeros((len(events), limit), np.float32), np.zeros((len(events), limit), np.float32), None)
    counts = np.zeros(len(events), np.int32)
    for clip, entries in enumerate(events):
        times = sorted((event["start"], event["end"]) for event in entries or () if _is_timed(event))
        counts[clip] = len(times)
        for index, (start, end) in enumerate(times[:limit]):
            made.start[clip, index], made.end[clip, index] = start, end
    return made._replace(count=np.minimum(counts, limit)), counts > limit


def _is_timed(event: Mapping[str, Any]) -> bool:
    return all(isinstance(event.get(name), int | float) for name in ("start", "end"))


def find_scenes(points: Int[Array, "N"], length: Int[Array, ""], limit: int) -> Scenes:
    """Find the intervals of a caption, given as code points.

    An interval is "[" TIME "-" TIME "]". TIME is seconds, mm:ss or hh:mm:ss, with or without a fraction, and may end
    with "s". Any dash is a separator, and TIME may be surrounded by white space. An interval that ends before it
    starts is a scene without overlap.

    Args:
        limit: S, the maximum number of candidates (brackets before a digit).
    """
    places = jnp.arange(len(points), dtype=jnp.int32)
    kind = _kinds(points)
    ahead = jnp.concatenate([kind[1:], jnp.full(1, OTHER)])
    after = jnp.concatenate([kind[2:], jnp.full(2, OTHER)])
    opens = (points == ord("[")) & (places < length)
    opens &= (ahead == DIGIT) | ((ahead == SPACE) & (after == DIGIT))
    at, count = compact(opens, places, limit)
    window = at[:, None] + 1 + jnp.arange(WINDOW)[None]
    read = jnp.where(window < length, window, len(points))
    characters = jnp.concatenate([points, jnp.zeros(1, points.dtype)])[jnp.minimum(read, len(points))]
    start, end, accepted = _read_intervals(characters.T)
    return Scenes(start, end, accepted & (jnp.arange(limit) < count), count > limit)


def _kinds(points: Array) -> Array:
    kind = jnp.full(points.shape, OTHER)
    for letter, number in KINDS.items():
        kind = jnp.where(points == ord(letter), number, kind)
    return kind


class _State(NamedTuple):
    """Parser state of S intervals."""

    whole: Float[Array, "S"]  # previous groups, in units of the current group
    number: Float[Array, "S"]  # the current group of digits
    scale: Float[Array, "S"]  # place value of the next digit after the decimal point; 0 before the point
    digits: Bool[Array, "S"]  # the current group has a digit
    colons: Int[Array, "S"]
    ended: Bool[Array, "S"]  # the current time is complete
    start: Float[Array, "S"]
    end: Float[Array, "S"]
    second: Bool[Array, "S"]  # the dash was read
    accepted: Bool[Array, "S"]
    failed: Bool[Array, "S"]


def _read_intervals(characters: Int[Array, "L S"]) -> tuple[Float[Array, "S"], Float[Array, "S"], Bool[Array, "S"]]:
    """Parse texts after an opening bracket: (start, end, whether it is an interval)."""

    def step(state: _State, points: Int[Array, "S"]) -> tuple[_State, None]:
        kind = _kinds(points)
        is_ = [kind == number for number in range(8)]
        running = ~state.accepted & ~state.failed
        fraction = state.scale > 0
        value = state.whole + state.number
        open_ = state.digits & ~state.ended
        allowed = jnp.select(
            is_,
            [
                ~state.ended,
                open_ & ~fraction & (state.colons < 2),
                open_ & ~fraction,
                state.digits | (state.colons == 0),
                open_,
                state.digits & ~state.second,
                state.digits & state.second,
                jnp.zeros_like(state.failed),
            ],
            False,
        )
        valid = running & allowed
        digit, colon, point = (valid & is_[number] for number in (DIGIT, COLON, POINT))
        dash, close = valid & is_[DASH], valid & is_[CLOSE]
        ends = valid & state.digits & (is_[SPACE] | is_[SECONDS])
        digit_value = (points - ord("0")).astype(jnp.float32)
        grown = jnp.where(fraction, state.number + digit_value * state.scale, state.number * 10 + digit_value)
        reset = colon | dash
        return _State(
            whole=jnp.where(dash, 0.0, jnp.where(colon, value * 60, state.whole)),
            number=jnp.where(reset, 0.0, jnp.where(digit, grown, state.number)),
            scale=jnp.where(
                dash, 0.0, jnp.where(point, 0.1, jnp.where(digit & fraction, state.scale / 10, state.scale))
            ),
            digits=(state.digits | digit) & ~reset,
            colons=jnp.where(dash, 0, state.colons + colon),
            ended=(state.ended | ends) & ~dash,
            start=jnp.where(dash, value, state.start),
            end=jnp.where(close, value, state.end),
            second=state.second | dash,
            accepted=state.accepted | close,
            failed=state.failed | (running & ~allowed),
        ), None

    size = characters.shape[1]
    zero, no = jnp.zeros(size), jnp.zeros(size, bool)
    begin = _State(zero, zero, zero, no, jnp.zeros(size, jnp.int32), no, zero, zero, no, no, no)
    state, _ = jax.lax.scan(step, begin, characters)
    return state.start, state.end, state.accepted


def timing_reward(scenes: Scenes, events: Events) -> Float[Array, ""]:
    """F1 of the summed time IoU of the best alignment in order; NaN without events, 0 without scenes."""
    real = jnp.arange(len(events.start)) < events.count
    overlap = jnp.minimum(scenes.end[:, None], events.end[None]) - jnp.maximum(
        scenes.start[:, None], events.start[None]
    )
    overlap = jnp.maximum(overlap, 0)
    lengths = jnp.maximum(scenes.end - scenes.start, 0)[:, None] + jnp.maximum(events.end - events.start, 0)[None]
    union = lengths - overlap
    iou = jnp.where(union > 0, overlap / jnp.where(union > 0, union, 1), 0.0)
    iou = jnp.where(scenes.valid[:, None] & real[None], iou, 0.0)

    def row(best: Float[Array, "E"], gains: Float[Array, "E"]) -> tuple[Float[Array, "E"], None]:
        """`best[j]`: maximum sum over the scenes up to this one and the first j + 1 events."""
        matched = jnp.concatenate([jnp.zeros(1), best[:-1]]) + gains
        return jax.lax.cummax(jnp.maximum(best, matched)), None

    best, _ = jax.lax.scan(row, jnp.zeros(len(events.start)), iou)
    total = jnp.sum(scenes.valid) + events.count
    return jnp.where(events.count > 0, 2 * best[-1] / jnp.maximum(total, 1), jnp.nan)

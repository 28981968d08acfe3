"""Find the words that describe the speaker of each line of dialogue.

W  words of a caption      R  quotes      S  words of a speaker phrase
"""

import jax
import jax.numpy as jnp

from avocado_jax.rewards.arrays import last_index, shift
from avocado_jax.rewards.attribution import BEFORE, Around, has_class
from avocado_jax.rewards.quotes import Quotes
from avocado_jax.rewards.vocabulary import BIT
from avocado_jax.typing import Array, Bool, Float, Int

MENTION = (2, 6)  # words before and after a noun that describe it
WITHIN = 0.8  # minimum shared weight, relative to the shorter phrase, of two phrases for the same speaker
OTHERS = 3  # maximum number of persons excluded by "the other"


def speakers(near: Around, quotes: Quotes) -> tuple[Int[Array, "R S"], Float[Array, "R S"]]:
    """Find the speaker phrase of each quote: stems and weights.

    The phrase consists of words of the quote's sentence: the last clause with content before the quote, and the words
    after it. If these have no content, the previous sentence is used. A pronoun or a generic noun refers to the person
    last described with it; "the other man" refers to a person that the previous quote's phrase does not mention.
    Repeated words are weighted once. Words that only state that something is spoken or written have weight 0.
    """
    words, size = near.outside, len(near.outside.start)

    def pick(at: Array, wanted: Array) -> tuple[Array, Array, Array]:
        stems, weights, classes = (
            jnp.where(wanted, values[at], 0) for values in (words.stems, words.weights, words.classes)
        )
        return stems, jnp.where(has_class(classes, "SILENT"), 0.0, weights), classes

    in_front = near.in_front
    _, front_weight, front = pick(near.front, in_front)
    # The last clause with content before its verb of speech ("then asks in a deep voice" has none). "and" ends a
    # clause only if a person follows.
    verb = has_class(front, "SPOKEN") & ~has_class(front, "PERSON", "SOURCE")

    def before_verb(mask: Array) -> Array:
        count = jnp.cumsum(mask, axis=1)
        return count > jax.lax.cummax(jnp.where(verb, count, 0), axis=1)

    content, person = before_verb(front_weight > 0), before_verb(has_class(front, "PERSON"))
    ends = has_class(front, "CONJUNCTION") & content & (person | ~has_class(front, "AND"))
    in_front &= jnp.cumsum(ends, axis=1) == 0
    first, first_weight, first_class = pick(near.front, in_front)
    second, second_weight, second_class = pick(near.behind, near.is_behind)

    # The previous sentence.
    front_count = jnp.sum(near.in_front, axis=1)
    bare = (jnp.sum(first_weight, -1) + jnp.sum(second_weight, -1) <= 0)[:, None]
    last = near.count - 1 - front_count
    far = last[:, None] - jnp.arange(BEFORE)[None]
    there = near.sentence[jnp.clip(last, 0, size - 1)][:, None]
    at = jnp.clip(far, 0, size - 1)
    third, third_weight, _ = pick(at, (far >= 0) & (near.sentence[at] == there))

    # The person last described.
    classes = jnp.concatenate([first_class, second_class], 1)
    weights = jnp.concatenate([first_weight, second_weight], 1)
    numbers = jnp.concatenate([near.front, near.behind], 1)
    generic = has_class(classes, "GENERIC") & (weights > 0)
    vague = generic.any(-1) & ~((weights > 0) & ~generic).any(-1)
    which = jnp.argmax(generic, axis=1)[:, None]
    head, head_class, head_at = (
        jnp.take_along_axis(values, which, 1)[:, 0]
        for values in (jnp.concatenate([first, second], 1), classes, numbers)
    )
    other = has_class(words.classes[jnp.maximum(head_at - 1, 0)], "OTHER")
    silent = has_class(words.classes, "SILENT") | (words.weights <= 0)
    described = jnp.concatenate([~silent[1:], jnp.zeros(1, bool)]) | jnp.concatenate([jnp.zeros(1, bool), ~silent[:-1]])
    joins = has_class(words.classes, "DESCRIBING")
    described |= jnp.concatenate([joins[1:], jnp.zeros(1, bool)])
    same = words.stems[None] == head[:, None]
    sex = words.classes & (BIT["MALE"] | BIT["FEMALE"])
    same |= words.pronoun[head_at][:, None] & ((sex[None] & head_class[:, None]) > 0)
    begins = jnp.min(jnp.where(in_front, near.front, near.count[:, None]), axis=1)
    known = same & (described & ~words.pronoun)[None] & (jnp.arange(size)[None] < begins[:, None])
    span = jnp.arange(-MENTION[0], MENTION[1] + 1)

    def mention(allowed: Array) -> tuple[Array, tuple[Array, Array]]:
        """The last of the allowed nouns of each quote and the words around it."""
        noun = jnp.max(jnp.where(allowed, jnp.arange(size)[None], -1), axis=1)
        at = noun[:, None] + span[None]
        clipped = jnp.clip(at, 0, size - 1)
        there = (
            (noun >= 0)[:, None] & (at >= 0) & (at < size) & (near.sentence[clipped] == near.sentence[noun][:, None])
        )
        nearby = words.classes[clipped]
        stops = (
            has_class(nearby, "CONJUNCTION", "SPOKEN") & ~has_class(nearby, "AND")
            | has_class(nearby, "PERSON") & ((span > 0) | (span < -1))[None]
        )
        ahead = jnp.cumsum(stops & (span > 0)[None], axis=1) > 0
        back = jnp.cumsum((stops & (span < 0)[None])[:, ::-1], axis=1)[:, ::-1] > 0
        there &= ~jnp.where((span > 0)[None], ahead, back & (span < 0)[None])
        stems, weights, _ = pick(clipped, there)
        return noun, (stems, weights)

    def compose(found: Array, described_by: tuple[Array, Array]) -> tuple[Array, Array]:
        padding = BEFORE - len(span) - 1
        stems, weights = (
            jnp.concatenate([values, head_values[:, None], jnp.zeros((len(head), padding), values.dtype)], 1)
            for values, head_values in zip(described_by, (head, jnp.max(weights_of_head, 1)))
        )
        use = (vague & (found >= 0))[:, None] & ~bare
        return jnp.where(use, stems, default), jnp.where(use, weights, default_weight)

    weights_of_head = jnp.where(generic, weights, 0)
    default, default_weight = jnp.where(bare, third, first), jnp.where(bare, third_weight, first_weight)
    noun, described_by = mention(known)
    plain, plain_weight = compose(noun, described_by)
    # "the other man": not the previous speaker.
    before, before_weight = (
        jnp.concatenate([jnp.zeros_like(values[:1]), values[:-1]]) for values in (plain, plain_weight)
    )

    def exclude(_: int, state: tuple) -> tuple:
        known, noun, described_by = state
        mine = described_by[0][:, :, None] == before[:, None, :]
        mine = (
            (mine & (before_weight > 0)[:, None, :]).any(-1)
            & (described_by[1] > 0)
            & (described_by[0] != head[:, None])
        )
        again = other & mine.any(-1)
        known &= ~(again[:, None] & (jnp.arange(size)[None] >= noun[:, None]))
        return known, *mention(known)

    _, noun, described_by = jax.lax.fori_loop(0, OTHERS, exclude, (known, noun, described_by))
    plain, plain_weight = compose(noun, described_by)

    phrase = jnp.concatenate([plain, second], -1)
    weight = jnp.concatenate([plain_weight, second_weight], -1)
    repeats = jnp.tril((phrase[:, :, None] == phrase[:, None, :]) & (weight > 0)[:, None, :], -1).any(-1)
    return phrase, jnp.where(repeats, 0.0, weight)


def same_as_before(
    spoken: Bool[Array, "R"], phrases: Int[Array, "R S"], weights: Float[Array, "R S"]
) -> Bool[Array, "R"]:
    """Whether each spoken quote has the speaker of the previous spoken quote: one phrase is within the other."""
    before = shift(last_index(spoken), 1, -1)
    at = jnp.maximum(before, 0)
    found = (phrases[:, :, None] == phrases[at][:, None, :]) & (weights[at] > 0)[:, None, :]
    common = jnp.sum(jnp.where(found.any(-1), weights, 0), -1)
    total = jnp.sum(weights, -1)
    shorter = jnp.minimum(total, total[at])
    return spoken & (before >= 0) & (common >= WITHIN * shorter)

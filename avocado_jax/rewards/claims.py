"""Find the words that a caption does not claim: denied words and alternatives.

N  code points of a caption      W  words of a caption
"""

import jax
import jax.numpy as jnp

from avocado_jax.rewards.arrays import count_before, next_index, shift
from avocado_jax.rewards.attribution import Words, has_class
from avocado_jax.rewards.quotes import Characters
from avocado_jax.typing import Array, Bool, Int

NEAR = 3  # words that a negation denies after it, and words on each side of "or" that are alternatives
ITEM, ITEMS = 3, 8  # maximum words of a list item, and maximum items before "or"


def unstated(text: Characters, words: Words, quoted: Bool[Array, "N"], sentence: Int[Array, "N"]) -> Bool[Array, "W"]:
    """Mask of the words outside quotes that are denied or are alternatives.

    Denied words are the three words after a negation, and all words of a sentence that is declared false ("it is false
    that ..."). Alternatives are the three words on each side of "or", up to the next comma; the items of a list whose
    last item follows "or"; and both sides of a slash.
    """
    inside = quoted[words.start]
    claimed = words.real & ~inside
    sentence_index = jnp.where(claimed, sentence[words.start], -1)
    classes = jnp.where(claimed, words.classes, 0)
    negation = has_class(classes, "NEGATING")
    denied = jnp.zeros(len(claimed), bool)
    for k in range(1, NEAR + 1):
        denied |= shift(negation, k, False) & (shift(sentence_index, k, -1) == sentence_index)

    that = shift(has_class(classes, "THAT"), -1, False)
    over = shift(sentence_index, -1, -1) != sentence_index
    untrue = has_class(classes, "TRUTH") & denied
    false = (has_class(classes, "DENIAL") | untrue) & (that | over)
    order = jnp.where(words.real, sentence[words.start], jnp.iinfo(jnp.int32).max)
    count = count_before(false)
    first, last = (jnp.searchsorted(order, order, side=edge) for edge in ("left", "right"))
    denied |= count[last] > count[first]

    joins = has_class(classes, "ALTERNATIVE")
    before_next = shift(words.start, -1, 0) - 1  # the character before the next word
    slash = (text.points[jnp.maximum(before_next, 0)] == ord("/")) & shift(claimed, -1, False)
    commas = count_before(text.points == ord(","))
    comma = commas[jnp.maximum(before_next, 0) + 1] > commas[words.start]
    alternative = slash | shift(slash, 1, False)
    open_ = ~comma  # no comma yet between "or" and the word
    near = joins & open_
    for k in range(1, NEAR + 1):
        alternative |= (shift(joins, -k, False) & (shift(sentence_index, -k, -1) == sentence_index)) | (
            shift(near, k, False) & (shift(sentence_index, k, -1) == sentence_index)
        )
        near &= shift(open_, -k, False)
    # Lists such as "red, blue, green or yellow".
    end = next_index(comma)
    item = (end - jnp.arange(len(comma)) < ITEM) & (end < len(comma) - 1)
    after = jnp.minimum(end + 1, len(comma) - 1)
    item &= sentence_index[after] == sentence_index
    alternative = jax.lax.fori_loop(0, ITEMS, lambda _, found: found | (item & found[after]), alternative)
    return (denied | alternative) & claimed

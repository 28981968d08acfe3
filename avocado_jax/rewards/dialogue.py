"""R_D: lines of dialogue and who speaks them, in order (paper, dialogue reward).

    Q  quoted lines of a caption      A  distinct characters of the reference's lines
    J  lines of the reference         K  words of 32 bits in a block

Similarity is 1 - edit distance / the longer length on normalised lines. An order-preserving alignment, of pairs whose
similarity reaches a threshold, maximises the summed similarity and, among such, the pairs with the same speaker
(within 1e-6 of the sum). S is half of both sums, recall S / J, precision S / Q, and R_D their F1; no line on either
side gives 1, on one side only 0.

Sums are integers in units of 2^-26, so that ties are the same on every device and in every order of work.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.arrays import compact
from avocado_jax.rewards.text import PHRASE, Caption, Limits, read_texts
from avocado_jax.rewards.vocabulary import BIT, Table, hash_word, meaning, stems_of, word_characters, words_of
from avocado_jax.typing import Array, Bool, Float, Int

SIMILAR = 0.6  # least similarity of two lines that may be one (paper)
SPEAKER = 0.55  # least share of a speaker's description that the words around the caption's quote must contain
WITHIN = 0.8  # least share of a phrase within another of the same reference that makes them one speaker
UNIT = 26  # bits after the point of a similarity
TIE = round(1e-6 * 2**UNIT)
VOICE = hash_word(meaning("voice"))
PAIRS = 128  # pairs of lines that are compared at once
BLOCK = 16  # words of a line of the reference that are compared at once
CHUNK = 64  # reference captions that are read at once


class Dialogue(NamedTuple):
    """The lines of one reference; of several where stacked.

    Attributes:
        lines, line_length: each line, normalised.
        alphabet: the distinct characters of the lines, sorted; the largest number behind them.
        speakers, speaker_weights: the stems of each speaker and what each says; 0 behind them.
        derived: whether the lines, and words around them for speakers, were read from a caption.
        count: how many lines there are; -1 where that is not known.
    """

    lines: Int[Array, "J line"]
    line_length: Int[Array, "J"]
    alphabet: Int[Array, "A"]
    speakers: Int[Array, "J S"]
    speaker_weights: Float[Array, "J S"]
    derived: Bool[Array, ""]
    count: Int[Array, ""]


class _Line(NamedTuple):
    characters: np.ndarray
    stems: np.ndarray
    weights: np.ndarray


def dialogue_references(
    table: Table,
    dialogues: Sequence[Sequence[Mapping[str, str]] | None],
    captions: Sequence[str | None],
    limits: Limits,
    alphabet: int = 0,
) -> tuple[Dialogue, np.ndarray]:
    """Stack the references of clips and return which of them were truncated to the limits.

    Args:
        dialogues: of each clip, {"speaker", "text"} in order; None where they are to be read from its caption.
        captions: reference captions; a clip with neither has no reference.
        limits: `quotes` and `line` bound the lines of a clip and the characters of a line.
        alphabet: most distinct characters in a clip's lines; 0: as many as these have.
    """
    known: list[list[_Line] | None] = [
        None if lines is None else _given(table, _merged(lines) if limits.merge else lines) for lines in dialogues
    ]
    truncated = np.zeros(len(known), bool)
    unread = [clip for clip, lines in enumerate(known) if lines is None and captions[clip] is not None]
    for first in range(0, len(unread), CHUNK):
        clips = unread[first : first + CHUNK]
        read = read_texts(table, [captions[clip] or "" for clip in clips], limits)
        for row, clip in enumerate(clips):
            known[clip] = _read(jax.tree.map(lambda leaf, row=row: leaf[row], read))
            truncated[clip] = read.truncated[row]
    truncated |= [lines is not None and len(lines) > limits.quotes for lines in known]
    truncated |= [
        any(len(line.characters) > limits.line or len(line.stems) > PHRASE for line in lines or ()) for lines in known
    ]
    kept_lines = [[line.characters[: limits.line] for line in (lines or ())[: limits.quotes]] for lines in known]
    alphabets = [np.unique(np.concatenate([*lines, np.zeros(0, np.int32)])) for lines in kept_lines]
    alphabet = alphabet or max(map(len, alphabets), default=0)
    n, shape = len(known), (len(known), limits.quotes)
    made = Dialogue(
        np.zeros((*shape, limits.line), np.int32),
        np.zeros(shape, np.int32),
        np.full((n, max(1, alphabet)), np.iinfo(np.int32).max, np.int32),
        np.zeros((*shape, PHRASE), np.uint32),
        np.zeros((*shape, PHRASE), np.float32),
        np.array([lines is None for lines in dialogues], bool),
        np.array([-1 if lines is None else min(len(lines), limits.quotes) for lines in known], np.int32),
    )
    for clip, lines in enumerate(known):
        truncated[clip] |= len(alphabets[clip]) > alphabet
        made.alphabet[clip, : len(alphabets[clip])] = alphabets[clip][:alphabet]
        for number, line in enumerate((lines or ())[: limits.quotes]):
            made.line_length[clip, number] = len(kept_lines[clip][number])
            made.lines[clip, number, : len(kept_lines[clip][number])] = kept_lines[clip][number]
            made.speakers[clip, number, : len(line.stems)] = line.stems[:PHRASE]
            made.speaker_weights[clip, number, : len(line.stems)] = line.weights[:PHRASE]
    return made, truncated


def _merged(lines: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Lines with consecutive ones of one speaker as one."""
    made: list[Mapping[str, str]] = []
    for line in lines:
        if made and made[-1]["speaker"] == line["speaker"]:
            made[-1] = {"speaker": line["speaker"], "text": f"{made[-1]['text']} {line['text']}"}
        else:
            made.append(line)
    return made


def _given(table: Table, lines: Sequence[Mapping[str, str]]) -> list[_Line]:
    made = []
    for line in lines:
        stems, weights, classes = stems_of(table, " ".join(dict.fromkeys(words_of(line["speaker"]))))
        weights = np.where(classes & BIT["SILENT"], 0, weights)
        made.append(_Line(word_characters(line["text"]), stems, _without_voice(stems, weights)))
    return [line for line in made if len(line.characters)]


def _without_voice(stems: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of a description: that it is a voice or a narrator counts only where nothing else is known."""
    others = np.where(stems == VOICE, 0, weights)
    return others if others.any() else weights


def _read(caption: Caption) -> list[_Line]:
    return [
        _Line(
            caption.lines[q, : caption.line_length[q]],
            caption.speakers[q],
            _without_voice(caption.speakers[q], caption.speaker_weights[q]),
        )
        for q in range(int(caption.quotes))
    ]


class Pairs(NamedTuple):
    """Every quoted line of a caption beside every line of the reference.

    Attributes:
        similarity: in units of 2^-26; 0 below the threshold.
        same: the words around the quote say who the reference says it is.
    """

    similarity: Int[Array, "Q J"]
    same: Bool[Array, "Q J"]


def dialogue_reward(
    caption: Caption, reference: Dialogue, similar: float = SIMILAR, speaker: float = SPEAKER
) -> Float[Array, ""]:
    """R_D of one caption, from 0 to 1; NaN without a reference."""
    return f1(compare(caption, reference, similar, speaker), caption.quotes, reference.count)


def f1(pairs: Pairs, quotes: Int[Array, ""], lines: Int[Array, ""]) -> Float[Array, ""]:
    """R_D from how the lines of both sides compare; NaN where `lines` is -1."""
    content, speakers = align(pairs, quotes, lines)
    score = (content.astype(jnp.float32) / 2**UNIT + speakers) / 2
    # The F1 of S / quotes and S / lines is 2 S / (quotes + lines).
    both = quotes + jnp.maximum(lines, 0)
    return jnp.where(lines < 0, jnp.nan, jnp.where(both == 0, 1.0, 2 * score / jnp.maximum(both, 1)))


def compare(caption: Caption, reference: Dialogue, similar: float = SIMILAR, speaker: float = SPEAKER) -> Pairs:
    """Similarity and speakers of all pairs of lines."""
    longest = jnp.maximum(caption.line_length[:, None], reference.line_length[None])
    shortest = jnp.minimum(caption.line_length[:, None], reference.line_length[None])
    most = max(caption.lines.shape[-1], reference.lines.shape[-1])
    # How many characters must agree, in the arithmetic of the host: 1 - 2/5 >= 0.6 has to hold everywhere.
    enough = [next(k for k in range(n + 2) if n == 0 or k > n or 1 - (n - k) / n >= similar) for n in range(most + 1)]
    enough = jnp.asarray(enough)[longest]
    needed = (shortest >= enough) & (longest > 0)  # no more characters can agree than the shorter line has
    agree = longest - edit_distances(caption.lines, caption.line_length, reference, needed)
    fits = needed & (agree >= enough)
    divisor = jnp.maximum(longest, 1)
    high, rest = jnp.divmod(agree << UNIT // 2, divisor)
    units = (high << UNIT // 2) + ((rest << UNIT // 2) + divisor // 2) // divisor
    return Pairs(jnp.where(fits, units, 0).astype(jnp.uint32), same_speaker(caption, reference, speaker))


def edit_distances(
    lines: Int[Array, "Q L"], length: Int[Array, "Q"], reference: Dialogue, needed: Bool[Array, "Q J"]
) -> Int[Array, "Q J"]:
    """Levenshtein distances of the pairs of lines that are needed, bit-parallel (Myers 1999, Hyyrö 2003).

    A column of the dynamic programme is its differences from row to row, +1 in `rises` and -1 in `falls`, a bit for
    each character of the reference's line; a column takes a few operations on words of 32 bits. Pairs are computed
    PAIRS at a time: the time is that of the needed ones. Of the others the distance is that of lines without a
    common character.
    """
    lines_ref, columns, j = reference.lines, lines.shape[-1], len(reference.lines)
    words = -(-lines_ref.shape[-1] // 32)
    blocks = -(-words // BLOCK)
    block = min(words, BLOCK)
    alphabet = reference.alphabet
    other = len(alphabet)  # a character that the reference does not have
    position = jnp.arange(lines_ref.shape[-1])
    symbol = jnp.where(
        position[None] < reference.line_length[:, None], jnp.searchsorted(alphabet, lines_ref), other + 1
    )
    masks = jnp.zeros((blocks * block, other + 1, j), jnp.uint32)
    bit = jnp.left_shift(jnp.uint32(1), (position % 32).astype(jnp.uint32))
    masks = masks.at[position // 32, symbol, jnp.arange(j)[:, None]].add(bit, mode="drop")
    masks = masks.reshape(blocks, block, other + 1, j)
    at = jnp.minimum(jnp.searchsorted(alphabet, lines), other - 1)
    text = jnp.where(alphabet[at] == lines, at, other)

    size = min(PAIRS, len(lines) * j)
    capacity = -(-len(lines) * j // size) * size
    order, count = compact(needed.reshape(-1), jnp.arange(len(lines) * j, dtype=jnp.int32), capacity)

    def some(state: tuple) -> tuple:
        first, found = state
        pair = jax.lax.dynamic_slice_in_dim(order, first, size)
        real = first + jnp.arange(size) < count
        quote, of = pair // j, pair % j
        symbols, until = text[quote].T, jnp.where(real, length[quote], 0)
        until_ref = jnp.where(real, reference.line_length[of], 0)
        used = -(-jnp.max(until_ref, initial=0) // (32 * block))  # blocks with a character of the reference

        def column(step: jax.Array, state: tuple) -> tuple:
            goes = step < until

            def one_block(number: jax.Array | int, state: tuple) -> tuple:
                rises, falls, carry, rise_in, fall_in = state
                match = masks[number, :, symbols[step], of].T  # [K, P]
                new_rises, new_falls = [], []
                for k in range(block):
                    up, down, equal = rises[k][number], falls[k][number], match[k]
                    both = equal & up
                    total = both + up
                    with_carry = total + carry
                    carry = ((total < both) | (with_carry < total)).astype(jnp.uint32)
                    across = (with_carry ^ up) | equal
                    rise, fall = down | ~(across | up), up & across
                    rise_next, fall_next = rise >> 31, fall >> 31
                    rise, fall = (rise << 1) | rise_in, (fall << 1) | fall_in
                    rise_in, fall_in = rise_next, fall_next
                    vertical = equal | down
                    up, down = jnp.where(goes, fall | ~(vertical | rise), up), jnp.where(goes, rise & vertical, down)
                    new_rises.append(jax.lax.dynamic_update_index_in_dim(rises[k], up, number, 0))
                    new_falls.append(jax.lax.dynamic_update_index_in_dim(falls[k], down, number, 0))
                return tuple(new_rises), tuple(new_falls), carry, rise_in, fall_in

            nothing = jnp.zeros(size, jnp.uint32)
            begin = (*state, nothing, nothing + 1, nothing)  # row 0 rises by one a column
            return (one_block(0, begin) if blocks == 1 else jax.lax.fori_loop(0, used, one_block, begin))[:2]

        full = jnp.full((blocks, size), 0xFFFFFFFF, jnp.uint32)
        start = ((full,) * block, (jnp.zeros_like(full),) * block)
        rises, falls = jax.lax.fori_loop(0, jnp.minimum(jnp.max(until, initial=0), columns), column, start)
        distance = until
        for k in range(block):
            before = 32 * (k + block * jnp.arange(blocks))  # characters before these words
            bits = jnp.clip(until_ref[None] - before[:, None], 0, 32).astype(jnp.uint32)
            inside = jnp.where(bits == 32, jnp.uint32(0xFFFFFFFF), jnp.left_shift(jnp.uint32(1), bits) - 1)
            for sign, values in ((1, rises[k]), (-1, falls[k])):
                ones = jax.lax.population_count(values & inside).astype(jnp.int32)
                distance = distance + sign * jnp.sum(ones, axis=0)
        return first + size, found.at[jnp.where(real, pair, len(found))].set(distance, mode="drop")

    furthest = jnp.maximum(length[:, None], reference.line_length[None]).astype(jnp.int32)
    state = (jnp.int32(0), furthest.reshape(-1))
    return jax.lax.while_loop(lambda state: state[0] < count, some, state)[1].reshape(len(lines), j)


def same_speaker(caption: Caption, reference: Dialogue, least: float = SPEAKER) -> Bool[Array, "Q J"]:
    """Whether the words around each quote describe the speaker of each line of the reference.

    They must contain at least the share `least` of the speaker's description, by weight. Where the reference's
    speakers are phrases of a caption, the share is of the shorter phrase. Of several speakers of the reference that
    the words describe, only the one described best counts: by share, then by weight, then the first. A line whose
    speaker the reference leaves open agrees with any.
    """
    overlap = _overlap(caption.speakers, caption.speaker_weights, reference)
    whole = jnp.sum(reference.speaker_weights, axis=-1)
    caption_weight = jnp.sum(caption.speaker_weights, axis=-1)[:, None]
    against = jnp.where(reference.derived, jnp.minimum(whole[None], caption_weight), whole[None])
    share = jnp.where(against > 0, overlap / jnp.maximum(against, 1e-9), 0.0)
    best = share >= jnp.max(share, axis=-1, keepdims=True, initial=0.0) - 1e-6
    chosen = jnp.argmax(
        jnp.where(best, overlap, -1.0) >= jnp.max(jnp.where(best, overlap, -1.0), -1)[:, None] - 1e-4, -1
    )
    # lines of the reference with one speaker: the same description, or where it was read, one within the other
    common = _overlap(reference.speakers, reference.speaker_weights, reference)
    shorter, longer = (of(whole[:, None], whole[None]) for of in (jnp.minimum, jnp.maximum))
    one = jnp.where(reference.derived, common >= WITHIN * shorter, common >= longer - 1e-4)
    return (whole == 0)[None] | ((share >= least) & one[chosen])


def _overlap(stems: Array, weights: Array, reference: Dialogue) -> Float[Array, "Q J"]:
    """The weight of the words of each speaker of the reference that each phrase contains."""
    found = (stems[:, :, None, None] == reference.speakers[None, None]) & (weights > 0)[:, :, None, None]
    return jnp.sum(jnp.any(found, axis=1) * reference.speaker_weights[None], axis=-1)


def align(pairs: Pairs, quotes: Int[Array, ""], lines: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Summed similarity (units) and same-speaker pairs of the best alignment, anti-diagonal by anti-diagonal."""
    rows, columns = pairs.similarity.shape
    row = jnp.arange(rows)

    def later(values: jax.Array) -> jax.Array:  # what the row above holds; above the first are zeros
        return jnp.concatenate([jnp.zeros(1, values.dtype), values[:-1]])

    def diagonal(state: tuple, number: jax.Array) -> tuple:
        last, before, result = state  # of the two diagonals before: (content, speakers) by row
        column = number - row
        inside = (column >= 0) & (column < columns)
        at = jnp.clip(column, 0, columns - 1)
        gain = jnp.where(inside, pairs.similarity[row, at], 0)
        up, match = (later(last[0]), later(last[1])), (later(before[0]), later(before[1]))
        options = [up, last, (match[0] + gain, match[1] + pairs.same[row, at])]
        possible = [jnp.ones(rows, bool), jnp.ones(rows, bool), gain > 0]
        most = jnp.max(jnp.stack([jnp.where(may, one[0], 0) for one, may in zip(options, possible)]), axis=0)
        content, speakers = jnp.zeros(rows, jnp.uint32), jnp.full(rows, -1)
        for one, may in zip(options, possible):
            near = may & (one[0] + TIE >= most)
            better = near & ((one[1] > speakers) | ((one[1] == speakers) & (one[0] > content)))
            content, speakers = jnp.where(better, one[0], content), jnp.where(better, one[1], speakers)
        here = (jnp.where(inside, content, 0), jnp.where(inside, speakers, 0))
        ends = (number == quotes + lines - 2) & (row == quotes - 1)
        result = tuple(old + jnp.sum(jnp.where(ends, new, 0), dtype=old.dtype) for old, new in zip(result, here))
        return (here, last, result), None

    nothing = (jnp.zeros(rows, jnp.uint32), jnp.zeros(rows, jnp.int32))
    start = (nothing, nothing, (jnp.uint32(0), jnp.int32(0)))
    (_, _, result), _ = jax.lax.scan(diagonal, start, jnp.arange(rows + columns - 1))
    some = (quotes > 0) & (lines > 0)
    return jnp.where(some, result[0], 0), jnp.where(some, result[1], 0)

"""R_D: F1 of the aligned dialogue lines and their speakers (paper, dialogue reward).

    Q  quoted lines of a caption      A  distinct characters of the reference's lines
    J  lines of the reference         K  32-bit words in a block

The similarity of two normalised lines is 1 - edit distance / longer length. The order-preserving alignment of pairs
above a similarity threshold maximises the summed similarity. Ties (within 1e-6) are broken by the number of pairs with
the same speaker. S is the mean of the two sums, recall is S / J, precision is S / Q, and R_D is their F1. R_D is 1 if
neither side has lines and 0 if exactly one side has none.

Sums are integers in units of 2^-26, so that ties do not depend on the device or on the order of additions.
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

SIMILAR = 0.6  # minimum similarity of two lines that match (paper)
SPEAKER = 0.55  # minimum share of a speaker's description that the words around the caption's quote must contain
WITHIN = 0.8  # minimum shared weight of two phrases of one reference that name the same speaker
UNIT = 26  # fractional bits of a similarity
TIE = round(1e-6 * 2**UNIT)
VOICE = hash_word(meaning("voice"))
PAIRS = 128  # line pairs compared in one iteration
BLOCK = 16  # 32-bit words of a reference line compared in one iteration
CHUNK = 64  # reference captions parsed in one call


class Dialogue(NamedTuple):
    """The lines of one reference, or of several if stacked.

    Attributes:
        lines, line_length: the normalised lines.
        alphabet: the sorted distinct characters of the lines, padded with the largest integer.
        speakers, speaker_weights: the stems of each speaker description and their weights, padded with 0.
        derived: whether the lines and speaker phrases were parsed from a caption.
        count: number of lines; -1 if unknown.
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
        dialogues: {"speaker", "text"} of each clip in order; None: parse them from the clip's caption.
        captions: reference captions; a clip with neither has no reference.
        limits: `quotes` limits the lines of a clip, `line` the characters of a line.
        alphabet: maximum distinct characters of a clip's lines; 0: the maximum of these clips.
    """
    known: list[list[_Line] | None] = [
        None if lines is None else _parse_lines(table, _merged(lines) if limits.merge else lines) for lines in dialogues
    ]
    truncated = np.zeros(len(known), bool)
    unread = [clip for clip, lines in enumerate(known) if lines is None and captions[clip] is not None]
    for first in range(0, len(unread), CHUNK):
        clips = unread[first : first + CHUNK]
        read = read_texts(table, [captions[clip] or "" for clip in clips], limits)
        for row, clip in enumerate(clips):
            known[clip] = _lines_of(jax.tree.map(lambda leaf, row=row: leaf[row], read))
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
    """Merge consecutive lines of the same speaker."""
    made: list[Mapping[str, str]] = []
    for line in lines:
        if made and made[-1]["speaker"] == line["speaker"]:
            made[-1] = {"speaker": line["speaker"], "text": f"{made[-1]['text']} {line['text']}"}
        else:
            made.append(line)
    return made


def _parse_lines(table: Table, lines: Sequence[Mapping[str, str]]) -> list[_Line]:
    """Normalise the lines of a record and look up the stems of their speakers."""
    made = []
    for line in lines:
        stems, weights, classes = stems_of(table, " ".join(dict.fromkeys(words_of(line["speaker"]))))
        weights = np.where(classes & BIT["SILENT"], 0, weights)
        made.append(_Line(word_characters(line["text"]), stems, _without_voice(stems, weights)))
    return [line for line in made if len(line.characters)]


def _without_voice(stems: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Set the weight of "voice" and "narrator" to 0 if the description has other words."""
    others = np.where(stems == VOICE, 0, weights)
    return others if others.any() else weights


def _lines_of(caption: Caption) -> list[_Line]:
    """The quoted lines of a parsed caption."""
    return [
        _Line(
            caption.lines[q, : caption.line_length[q]],
            caption.speakers[q],
            _without_voice(caption.speakers[q], caption.speaker_weights[q]),
        )
        for q in range(int(caption.quotes))
    ]


class Pairs(NamedTuple):
    """Comparison of every quoted line of a caption with every line of the reference.

    Attributes:
        similarity: similarity in units of 2^-26; 0 below the threshold.
        same: whether the words around the quote describe the speaker of the reference line.
    """

    similarity: Int[Array, "Q J"]
    same: Bool[Array, "Q J"]


def dialogue_reward(
    caption: Caption, reference: Dialogue, similar: float = SIMILAR, speaker: float = SPEAKER
) -> Float[Array, ""]:
    """Compute R_D of one caption in [0, 1]; NaN without a reference."""
    return f1(compare(caption, reference, similar, speaker), caption.quotes, reference.count)


def f1(pairs: Pairs, quotes: Int[Array, ""], lines: Int[Array, ""]) -> Float[Array, ""]:
    """Compute R_D from the line comparisons; NaN if `lines` is -1."""
    content, speakers = align(pairs, quotes, lines)
    score = (content.astype(jnp.float32) / 2**UNIT + speakers) / 2
    # The F1 of S / quotes and S / lines is 2 S / (quotes + lines).
    both = quotes + jnp.maximum(lines, 0)
    return jnp.where(lines < 0, jnp.nan, jnp.where(both == 0, 1.0, 2 * score / jnp.maximum(both, 1)))


def compare(caption: Caption, reference: Dialogue, similar: float = SIMILAR, speaker: float = SPEAKER) -> Pairs:
    """Compare all pairs of lines: similarity and speaker."""
    longest = jnp.maximum(caption.line_length[:, None], reference.line_length[None])
    shortest = jnp.minimum(caption.line_length[:, None], reference.line_length[None])
    most = max(caption.lines.shape[-1], reference.lines.shape[-1])
    # Number of characters that must agree, computed on the host: 1 - 2/5 >= 0.6 must hold on every device.
    enough = [next(k for k in range(n + 2) if n == 0 or k > n or 1 - (n - k) / n >= similar) for n in range(most + 1)]
    enough = jnp.asarray(enough)[longest]
    needed = (shortest >= enough) & (longest > 0)  # at most `shortest` characters can agree
    agree = longest - edit_distances(caption.lines, caption.line_length, reference, needed)
    fits = needed & (agree >= enough)
    divisor = jnp.maximum(longest, 1)
    high, rest = jnp.divmod(agree << UNIT // 2, divisor)
    units = (high << UNIT // 2) + ((rest << UNIT // 2) + divisor // 2) // divisor
    return Pairs(jnp.where(fits, units, 0).astype(jnp.uint32), same_speaker(caption, reference, speaker))


def edit_distances(
    lines: Int[Array, "Q L"], length: Int[Array, "Q"], reference: Dialogue, needed: Bool[Array, "Q J"]
) -> Int[Array, "Q J"]:
    """Compute Levenshtein distances of the needed pairs of lines, bit-parallel (Myers 1999, Hyyrö 2003).

    A column of the dynamic programme is stored as its row-to-row differences: +1 in `rises`, -1 in `falls`, one bit per
    character of the reference line. A column takes a few operations on 32-bit words. The loop computes PAIRS needed
    pairs per iteration and skips the others, whose distance is set to the longer length.
    """
    lines_ref, columns, j = reference.lines, lines.shape[-1], len(reference.lines)
    words = -(-lines_ref.shape[-1] // 32)
    blocks = -(-words // BLOCK)
    block = min(words, BLOCK)
    alphabet = reference.alphabet
    other = len(alphabet)  # symbol of all characters that are not in the reference
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

    def next_pairs(state: tuple) -> tuple:
        first, found = state
        pair = jax.lax.dynamic_slice_in_dim(order, first, size)
        real = first + jnp.arange(size) < count
        quote, line = pair // j, pair % j
        symbols, until = text[quote].T, jnp.where(real, length[quote], 0)
        until_ref = jnp.where(real, reference.line_length[line], 0)
        used = -(-jnp.max(until_ref, initial=0) // (32 * block))  # blocks that contain reference characters

        def column(step: jax.Array, state: tuple) -> tuple:
            goes = step < until

            def one_block(number: jax.Array | int, state: tuple) -> tuple:
                rises, falls, carry, rise_in, fall_in = state
                match = masks[number, :, symbols[step], line].T  # [K, P]
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
            begin = (*state, nothing, nothing + 1, nothing)  # row 0 increases by one per column
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
    return jax.lax.while_loop(lambda state: state[0] < count, next_pairs, state)[1].reshape(len(lines), j)


def same_speaker(caption: Caption, reference: Dialogue, least: float = SPEAKER) -> Bool[Array, "Q J"]:
    """Whether the words around each quote describe the speaker of each line of the reference.

    The words must contain at least the share `least` of the speaker's description, by weight. If the reference was
    parsed from a caption, the share is relative to the shorter phrase. If the words describe several speakers of the
    reference, only the best one matches: by share, then by weight, then the first. A reference line without a speaker
    matches any quote.
    """
    overlap = _overlap(caption.speakers, caption.speaker_weights, reference)
    reference_weight = jnp.sum(reference.speaker_weights, axis=-1)
    caption_weight = jnp.sum(caption.speaker_weights, axis=-1)[:, None]
    full = reference_weight[None]
    denominator = jnp.where(reference.derived, jnp.minimum(full, caption_weight), full)
    share = jnp.where(denominator > 0, overlap / jnp.maximum(denominator, 1e-9), 0.0)
    best = share >= jnp.max(share, axis=-1, keepdims=True, initial=0.0) - 1e-6
    chosen = jnp.argmax(
        jnp.where(best, overlap, -1.0) >= jnp.max(jnp.where(best, overlap, -1.0), -1)[:, None] - 1e-4, -1
    )
    # Reference lines of the same speaker: equal descriptions or, if parsed from a caption, one within the other.
    common = _overlap(reference.speakers, reference.speaker_weights, reference)
    shorter, longer = (reduce(reference_weight[:, None], full) for reduce in (jnp.minimum, jnp.maximum))
    same = jnp.where(reference.derived, common >= WITHIN * shorter, common >= longer - 1e-4)
    return (full == 0) | ((share >= least) & same[chosen])


def _overlap(stems: Array, weights: Array, reference: Dialogue) -> Float[Array, "Q J"]:
    """The weight of the words that each phrase shares with each speaker of the reference."""
    found = (stems[:, :, None, None] == reference.speakers[None, None]) & (weights > 0)[:, :, None, None]
    return jnp.sum(jnp.any(found, axis=1) * reference.speaker_weights[None], axis=-1)


def align(pairs: Pairs, quotes: Int[Array, ""], lines: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Summed similarity (in units) and same-speaker pairs of the best alignment. Scans the anti-diagonals."""
    rows, columns = pairs.similarity.shape
    row = jnp.arange(rows)

    def previous_row(values: jax.Array) -> jax.Array:  # the values of the row above; 0 above the first row
        return jnp.concatenate([jnp.zeros(1, values.dtype), values[:-1]])

    def diagonal(state: tuple, number: jax.Array) -> tuple:
        last, before, result = state  # the two previous diagonals: (content, speakers) by row
        column = number - row
        inside = (column >= 0) & (column < columns)
        at = jnp.clip(column, 0, columns - 1)
        gain = jnp.where(inside, pairs.similarity[row, at], 0)
        up, match = tuple(map(previous_row, last)), tuple(map(previous_row, before))
        options = [up, last, (match[0] + gain, match[1] + pairs.same[row, at])]
        possible = [jnp.ones(rows, bool), jnp.ones(rows, bool), gain > 0]
        most = jnp.max(jnp.stack([jnp.where(may, option[0], 0) for option, may in zip(options, possible)]), axis=0)
        content, speakers = jnp.zeros(rows, jnp.uint32), jnp.full(rows, -1)
        for (new_content, new_speakers), may in zip(options, possible):
            near = may & (new_content + TIE >= most)
            better = near & ((new_speakers > speakers) | ((new_speakers == speakers) & (new_content > content)))
            content, speakers = jnp.where(better, new_content, content), jnp.where(better, new_speakers, speakers)
        here = (jnp.where(inside, content, 0), jnp.where(inside, speakers, 0))
        ends = (number == quotes + lines - 2) & (row == quotes - 1)
        result = tuple(old + jnp.sum(jnp.where(ends, new, 0), dtype=old.dtype) for old, new in zip(result, here))
        return (here, last, result), None

    nothing = (jnp.zeros(rows, jnp.uint32), jnp.zeros(rows, jnp.int32))
    start = (nothing, nothing, (jnp.uint32(0), jnp.int32(0)))
    (_, _, result), _ = jax.lax.scan(diagonal, start, jnp.arange(rows + columns - 1))
    some = (quotes > 0) & (lines > 0)
    return jnp.where(some, result[0], 0), jnp.where(some, result[1], 0)

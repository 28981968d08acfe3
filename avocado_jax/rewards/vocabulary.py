"""Tables of token ids, characters and words as arrays, built once on the host from a tokenizer and Unicode tables.

Words are represented by hashes of their stems: a polynomial over code points, mod 2^32. A stem is a prefix of its word,
so the device computes its hash from one cumulative sum. `hash_word` and `stem` are the same computation on the host.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from avocado_jax.rewards.lexicon import CLASSES, EXCLUSIVE, EXCLUSIVE_WEIGHT, FORMS, FUNCTION, PRONOUNS
from avocado_jax.typing import Array, Float, Int

WORD, SPACE, LOWER, UPPER, ALONE, STOP, STOP_CJK, CLOSER, APOSTROPHE, DIGIT, NEWLINE, LEAD, TAIL, END = (
    1 << bit for bit in range(14)
)
MARK = 14  # the kinds of quotation marks are stored from this bit on
STRAIGHT, LEFT, RIGHT, CORNER, CORNER_END, WHITE, WHITE_END, APOSTROPHE_MARK, SINGLE_LEFT, STAR = range(1, 11)
MARKS = {'"': STRAIGHT, "＂": STRAIGHT, "“": LEFT, "„": LEFT, "‟": LEFT, "«": LEFT, "”": RIGHT, "»": RIGHT}
MARKS |= {"「": CORNER, "」": CORNER_END, "『": WHITE, "』": WHITE_END}
SINGLE_MARKS = {"'": APOSTROPHE_MARK, "’": APOSTROPHE_MARK, "‘": SINGLE_LEFT, "*": STAR}
SCRIPTS_WITHOUT_SPACES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
BIT = {name: 1 << bit for bit, name in enumerate([*CLASSES, "FUNCTION", "SILENT"])}
LEAST_KNOWN = 1024  # minimum capacity for words with a weight
PAGE = 256  # code points of a page of the character table
BASE, SPREAD = 0x01000193, 0x9E3779B1  # both odd: powers of the base have inverses mod 2^32


class Table(NamedTuple):
    """Arrays that describe ids and characters: an argument of every function that parses text.

    Attributes:
        starts: offset of each id's bytes in `data`; special and unused ids have no bytes.
        data: the bytes of all ids.
        page: page number of each 256 code points.
        lower, kind: offset to lower case and kind bits of each code point, by page and offset in the page.
        forms, becomes: sorted stem hashes of irregular forms, and the stem hashes that replace them.
        known, weight: sorted stem hashes and their weights (idf), padded with the largest integer.
        unknown: weight of all other stems.
        classed, classes: sorted stem hashes and the bits of their word classes (BIT).
        pronouns: sorted stem hashes of pronouns, before `forms` is applied.
    """

    starts: Int[Array, "V+1"]
    data: Int[Array, "bytes"]
    page: Int[Array, "pages"]
    lower: Int[Array, "distinct 256"]
    kind: Int[Array, "distinct 256"]
    forms: Int[Array, "forms"]
    becomes: Int[Array, "forms"]
    known: Int[Array, "known"]
    weight: Float[Array, "known"]
    unknown: Float[Array, ""]
    classed: Int[Array, "classed"]
    classes: Int[Array, "classed"]
    pronouns: Int[Array, "pronouns"]


def make_table(tokenizer: str | None = None, weights: Mapping[str, float] | None = None) -> Table:
    """Build the table of a tokenizer and of word weights.

    Args:
        tokenizer: the text of a Hugging Face tokenizer.json with a BPE model; None if no ids are decoded.
        weights: stem -> weight (`word_weights`). Default: 0 for function words, equal weights for others.

    Raises:
        ValueError: the tokenizer is not a supported BPE.
    """
    starts, data = (np.zeros(2, np.int32), np.zeros(1, np.uint8)) if tokenizer is None else token_bytes(tokenizer)
    page, lower, kind = characters()
    weights = word_weights([]) if weights is None else weights
    hashed = {hash_word(word): weight for word, weight in weights.items() if word}
    known = np.sort(np.fromiter(hashed, np.uint32))
    more = (0, max(LEAST_KNOWN, 1 << (len(known) - 1).bit_length()) - len(known))  # tables of few sizes
    forms = {hash_word(form): hash_word(base) for form, base in _forms().items()}
    sources = np.sort(np.fromiter(forms, np.uint32))
    return Table(
        starts,
        data,
        page,
        lower,
        kind,
        sources,
        np.array([forms[int(source)] for source in sources], np.uint32),
        np.pad(known, more, constant_values=0xFFFFFFFF),
        np.pad(np.array([hashed[int(key)] for key in known], np.float32), more, constant_values=weights[""]),
        np.float32(weights[""]),
        *_classes(),
        np.unique(np.array([hash_word(stem(word)) for word in PRONOUNS.split()], np.uint32)),
    )


def token_bytes(tokenizer: str) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the bytes of all ids: (starts [V+1], bytes), from the text of a tokenizer.json.

    Supports byte-level BPE (GPT-2's characters for bytes) and SentencePiece BPE, where "▁" is a space and "<0x0A>" a
    byte. Special ids have no bytes; other added tokens have the bytes of their text.
    """
    content = json.loads(tokenizer)
    model = content["model"]
    decoder = json.dumps(content.get("decoder") or {})
    if model.get("type", "BPE") != "BPE" or not ("ByteLevel" in decoder or "ByteFallback" in decoder):
        raise ValueError("the tokenizer must be a byte-level or byte-fallback BPE")
    spelled = _byte_characters() if "ByteLevel" in decoder else None
    pieces: dict[int, bytes] = {}
    for token, number in model["vocab"].items():
        if spelled is None:
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            pieces[number] = bytes([int(token[3:5], 16)]) if byte else token.replace("▁", " ").encode()
        elif all(letter in spelled for letter in token):
            pieces[number] = bytes(spelled[letter] for letter in token)
        else:  # not byte-level characters: the decoder keeps the text unchanged
            pieces[number] = token.encode()
    for added in content.get("added_tokens", ()):
        pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    every = [pieces.get(number, b"") for number in range(max(pieces) + 1)]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in every])]).astype(np.int32)
    return starts, np.frombuffer(b"".join(every) or b"\0", np.uint8)


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 represents itself; other bytes use U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}


@lru_cache(maxsize=1)
def characters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower case and kinds of all code points from Python's Unicode tables: (page, lower, kind), without equal pages.

    Lower-casing is by code point: a capital sigma is always "σ", and so is the final one; "İ" is "i".
    """
    every = list(map(chr, range(0x110000)))
    lower = np.fromiter((ord(character.lower()[0]) for character in every), np.int32)
    lower[ord("ς")] = ord("σ")
    kind = WORD * np.fromiter(map(str.isalnum, every), np.int32)
    kind[ord("_")] = WORD  # as \w of `re`
    kind |= SPACE * np.fromiter(map(str.isspace, every), np.int32)
    kind |= LOWER * np.fromiter(map(str.islower, every), np.int32)
    kind |= UPPER * np.fromiter(map(str.isupper, every), np.int32)
    kind |= DIGIT * np.fromiter(map(str.isdecimal, every), np.int32)
    for first, last in SCRIPTS_WITHOUT_SPACES:
        kind[first : last + 1] |= ALONE * (kind[first : last + 1] & WORD)
    for group, bit in (
        (".!?…", STOP),
        ("。！？", STOP_CJK),
        (")]}'’*`", CLOSER),
        (",:;([{—–，：；（", LEAD),
        (".,!?…;:)]}'’，。！？", TAIL),
        (".!?…。！？,，-—~", END),
        ("'’`", APOSTROPHE),
        ("\n\r\u2028\u2029", NEWLINE),
    ):
        kind[[ord(character) for character in group]] |= bit
    for mark, number in MARKS.items():
        kind[ord(mark)] |= number << MARK
        kind[ord(mark)] |= CLOSER
        kind[ord(mark)] |= TAIL * (number not in (CORNER, WHITE))
    for mark, number in SINGLE_MARKS.items():
        kind[ord(mark)] |= number << MARK
    both = np.concatenate([(lower - np.arange(len(lower))).reshape(-1, PAGE), kind.reshape(-1, PAGE)], axis=1)
    distinct, page = np.unique(both, axis=0, return_inverse=True)
    return page.reshape(-1).astype(np.int32), distinct[:, :PAGE].astype(np.int32), distinct[:, PAGE:].astype(np.int32)


def hash_word(word: str) -> int:
    """The 32-bit hash of a word, without stemming."""
    total = 0
    for exponent, letter in enumerate(word):
        total += _mix_bits(ord(letter)) * pow(BASE, exponent, 1 << 32)
    return (total & 0xFFFFFFFF) or 1


def _mix_bits(point: int) -> int:
    mixed = (point + 1) * SPREAD & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


def stem(word: str) -> str:
    """The stem of a lower-case word, always a prefix: strip plural, past, -ing, -ly, and a final e or y."""

    def shorten(ending: str, least: int, keeps: str = "") -> bool:
        nonlocal word
        if len(word) < least or not word.endswith(ending) or word[-len(ending) - 1] in keeps:
            return False
        word = word[: -len(ending)]
        return True

    shorten("s", 4, "sui")
    if (shorten("ing", 6) or shorten("ed", 5)) and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    else:
        shorten("ly", 6)
    shorten("e", 4)
    shorten("y", 4) or shorten("i", 4)
    return word


@lru_cache(maxsize=1)
def _forms() -> dict[str, str]:
    groups = [group.split() for group in FORMS.split("|")]
    return {stem(form): stem(group[0]) for group in groups for form in group[1:] if stem(form) != stem(group[0])}


def meaning(word: str) -> str:
    """The stem that represents a lower-case word: its own stem, or that of the base form in FORMS."""
    return _forms().get(stem(word), stem(word))


@lru_cache(maxsize=1)
def _classes() -> tuple[np.ndarray, np.ndarray]:
    """Sorted stem hashes of all words of a class, and the bits of their classes."""
    found = Counter()
    for name, words in (*CLASSES.items(), ("FUNCTION", FUNCTION)):
        for key in {hash_word(meaning(word)) for word in words.split()}:
            found[key] |= BIT[name]
    says = BIT["SPOKEN"] | BIT["WRITTEN"] | BIT["SUBTITLE"]
    for key, bits in found.items():  # words that state that something is spoken or written, not by whom
        found[key] |= BIT["SILENT"] * ((bits & says > 0 and not bits & BIT["VOICE"]) or bits & BIT["SIGHT"] > 0)
    hashes = np.sort(np.fromiter(found, np.uint32))
    return hashes, np.array([found[int(key)] for key in hashes], np.int32)


def word_characters(text: str) -> np.ndarray:
    """The word characters of a text in lower case, as code points: how R_D compares lines."""
    page, lower, kind = characters()
    points = code_points([text])[0][0]
    points = points[(kind[page[points >> 8], points & (PAGE - 1)] & WORD) > 0]
    return points + lower[page[points >> 8], points & (PAGE - 1)]


def stems_of(table: Table, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stem hashes of a text's words, their weights, and their classes (BIT)."""
    stems = np.array([hash_word(meaning(word)) for word in words_of(text)], np.uint32)
    at = np.minimum(np.searchsorted(table.known, stems), len(table.known) - 1)
    weights = np.where(table.known[at] == stems, table.weight[at], table.unknown).astype(np.float32)
    at = np.minimum(np.searchsorted(table.classed, stems), len(table.classed) - 1)
    return stems, weights, np.where(table.classed[at] == stems, table.classes[at], 0)


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words as `read` does: apostrophes are removed, each Chinese character is a word."""
    page, lower, kind = characters()
    words, before = [], 0
    points = [ord(character) for character in text]
    kinds = [int(kind[page[point >> 8], point & 255]) for point in points]
    for index, (point, here) in enumerate(zip(points, kinds)):
        if here & WORD:
            letter = chr(point + int(lower[page[point >> 8], point & 255]))
            bridged = index > 1 and before & APOSTROPHE and kinds[index - 2] & WORD
            bridged = bridged and not (kinds[index - 2] & LOWER and here & UPPER)  # says'No
            continues = before & WORD or bridged
            if (
                words
                and continues
                and not here & ALONE
                and not kinds[index - 1 if before & WORD else index - 2] & ALONE
            ):
                words[-1] += letter
            else:
                words.append(letter)
        before = here
    return words


def word_weights(texts: Iterable[str]) -> dict[str, float]:
    """Compute stem weights: log((n + 20) / (texts with the stem + 1.6)); 0 for function words; "" for other stems.

    The smoothing equals 20 additional texts, 1.6 of them with each word, so that words of a small corpus are not all
    common. Colours, sides, numbers etc. (EXCLUSIVE) have a weight of at least 2.5, the weight of all words without
    texts, because exchanging them makes a statement false.
    """
    texts = list(texts)
    counts = Counter(key for text in texts for key in {meaning(word) for word in words_of(text)})
    weights = {key: math.log((len(texts) + 20) / (count + 1.6)) for key, count in counts.items()}
    unknown = math.log((len(texts) + 20) / 1.6)
    exclusive = {key: max(weights.get(key, unknown), EXCLUSIVE_WEIGHT) for key in map(meaning, EXCLUSIVE.split())}
    return weights | dict.fromkeys(map(meaning, FUNCTION.split()), 0.0) | exclusive | {"": unknown}


def code_points(texts: Sequence[str], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Convert texts to padded code points [n, size], composed (NFC) as in tokenizers, and their untruncated lengths."""
    points = [
        np.frombuffer(unicodedata.normalize("NFC", text).encode("utf-32-le", "surrogatepass"), np.uint32)
        for text in texts
    ]
    lengths = np.array([len(codes) for codes in points], np.int32)
    size = size or max(1, *lengths)
    padded = np.zeros((len(points), size), np.int32)
    for row, codes in zip(padded, points):
        row[: len(codes)] = codes[:size]
    return padded, lengths

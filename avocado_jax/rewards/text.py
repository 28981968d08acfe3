"""Captions as arrays: token ids to bytes, code points, words, sentences, quoted lines and who is said to speak them.

    N  code points of a caption            Q  quoted lines of a caption
    W  words of a caption                  S  words of a speaker phrase

Everything is for one caption, of static shape, and is vmapped by those who call it. What does not fit a limit is cut,
and `truncated` says so. The same program reads references (`read_texts`), so that both sides follow one set of rules.

Words are hashes of stems: a polynomial over code points, mod 2^32, so that the hash of any prefix of a word (which is
what a stem is) comes from one running sum. `hash_word` and `stem` are the same on the host.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.typing import Array, Bool, Float, Int

WORD, SPACE, LOWER, ALONE, STOP, STOP_CJK, CLOSER, APOSTROPHE, DIGIT, NEWLINE = (1 << bit for bit in range(10))
MARK = 10  # the kinds of quotation marks stand above this bit
STRAIGHT, LEFT, RIGHT, CORNER, CORNER_END, WHITE, WHITE_END = range(1, 8)
MARKS = {'"': STRAIGHT, "＂": STRAIGHT, "“": LEFT, "„": LEFT, "‟": LEFT, "«": LEFT, "”": RIGHT, "»": RIGHT}
MARKS |= {"「": CORNER, "」": CORNER_END, "『": WHITE, "』": WHITE_END}
SCRIPTS_WITHOUT_SPACES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
PAGE = 256  # code points of a page of the character table
REPLACEMENT = 0xFFFD
BASE, SPREAD = 0x01000193, 0x9E3779B1  # both odd: powers of the base have inverses mod 2^32
BEFORE, AFTER = 24, 8  # words of a speaker phrase before and after its quote
PHRASE = BEFORE + AFTER

# Other forms of a word that no suffix rule finds, and the plainest words for the same; a group becomes its first.
FORMS = """man men he him his himself male guy gentleman|woman women she her hers herself female lady|
child children kid kids|person people|run ran|stand stood|sit sat|hold held|say said|speak spoke spoken speech|
tell told|go went gone goes|come came|take took taken|give gave given|begin began begun start commence|fall fell fallen|
fly flew flown|see saw seen|wear wore worn|write wrote written|drive drove driven|ride rode ridden|sing sang sung|
throw threw thrown|catch caught|lie lay lying|rise rose risen|shake shook shaken|hear heard|
hit hitting|swim swam swum|grey gray|feet foot|hands hand|ring rang rung|blow blew blown|break broke broken|
bring brought|eat ate eaten|wake woke|make made|two 2|three 3|four 4|five 5|six 6|seven 7|eight 8|
nine 9|ten 10|one 1|family families|
big large huge|small little tiny|soft quiet faint gentle|screen frame|appear emerge|show shown display|
jump leap hop|spin rotate turn|bump crash collide|music tune melody song|background backdrop|car vehicle|
picture image photo photograph|road street|smile grin|look gaze stare|glance peek|happy cheerful joyful"""
# Words that carry nothing of what is said to be seen or heard.
FUNCTION = """a an the this that these those it its is are was were be been being am and or but so as of in on at to
from by with for into onto over under near off out up down then while when where which who whom whose there here i you
we they them their our your my me us do does did have has had having can could will would shall should may might must
if than also too very just not no nor s t re ve ll d m one some any each other another both such only own same more
most now how what why all because until during after before between through about against again further once
的 了 在 是 和 着 与 也 就 都 而 及 一 个 这 那 有 他 她 它 们 为 以 上 中 到 地 得"""
# Words that say that something is spoken, and words that say that it is written: neither says who speaks.
SPOKEN = """say says speak tell ask reply respond answer state exclaim narrate continue add shout yell whisper call
cry explain announce declare remark comment murmur mutter sing repeat insist claim note mention warn suggest wonder
want know question inquire introduce conclude laugh scream voice hear audio sound narration dialogue speech remind
agree greet chant utter instruct 说 道 问 答 喊 叫 讲 唱"""
WRITTEN = (
    "text word title caption subtitle sign label letter lettering logo banner overlay headline written read 字 写 幕"
)
# One of these in place of another is a contradiction, so none counts for little.
EXCLUSIVE = """red orange yellow green blue purple violet pink brown black white grey silver gold golden left right top
bottom upper lower above below up down man woman boy girl two three four five six seven eight nine ten first second
third big small loud soft high low fast slow open close inside outside day night
红 橙 黄 绿 蓝 紫 黑 白 左 右 男 女"""
EXCLUSIVE_WEIGHT = 2.5
NEGATING = "no not never without none nobody nothing dont doesnt didnt isnt arent wasnt werent cant wont 不 没"


class Limits(NamedTuple):
    """How much of a caption is read. Static."""

    characters: int = 8192
    words: int = 2048
    quotes: int = 32
    line: int = 400  # characters of a quoted line, normalised


def limits_for(tokens: int) -> Limits:
    """Limits that ordinary captions of up to so many tokens stay within."""
    return Limits(characters=max(256, 6 * tokens), words=max(64, tokens + tokens // 4))


class Table(NamedTuple):
    """What ids and characters mean, as arrays: an argument of every function that reads text.

    Attributes:
        starts: where each id's bytes begin in `data`; special ids and ids that stand for nothing have none.
        page: the page of each 256 code points.
        lower, kind: code points in lower case, and what they are (bits), by page and place.
        forms, becomes: sorted stem hashes that are read as another.
        known, weight: sorted stem hashes and how much each says (idf); `unknown` is the weight of all others.
        spoken, written, negating: sorted stem hashes.
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
    spoken: Int[Array, "spoken"]
    written: Int[Array, "written"]
    negating: Int[Array, "negating"]


class Caption(NamedTuple):
    """One caption, read.

    Attributes:
        points: its code points, 0 past the end; `length` of them.
        letters: the word characters in lower case, one after another.
        stems, weights: of each word: its hash (0 past the end) and how much it says.
        word_start: where each word begins in `points`.
        negated: words that a negation stands shortly before, outside quotes.
        quote_start, quote_end: each quoted line, without its marks, in `points`; on-screen text is not among them.
        lines, line_length: each quoted line as R_D compares it: word characters in lower case.
        speakers, speaker_weights: words around each quote, outside of quotes, and how much they say of who speaks.
        truncated: something did not fit the limits.
    """

    points: Int[Array, "N"]
    length: Int[Array, ""]
    letters: Int[Array, "N"]
    stems: Int[Array, "W"]
    weights: Float[Array, "W"]
    word_start: Int[Array, "W"]
    words: Int[Array, ""]
    negated: Bool[Array, "W"]
    quote_start: Int[Array, "Q"]
    quote_end: Int[Array, "Q"]
    quotes: Int[Array, ""]
    lines: Int[Array, "Q line"]
    line_length: Int[Array, "Q"]
    speakers: Int[Array, "Q S"]
    speaker_weights: Float[Array, "Q S"]
    truncated: Bool[Array, ""]


# On the host: tables.


def make_table(tokenizer: str | None = None, weights: Mapping[str, float] | None = None) -> Table:
    """The table of a tokenizer and of word weights.

    Args:
        tokenizer: the text of a Hugging Face tokenizer.json with a BPE model; None where no ids are read.
        weights: how much each stem says (`word_weights`); by default function words nothing and all others alike.

    Raises:
        ValueError: the tokenizer is of a kind whose bytes are not known.
    """
    starts, data = (np.zeros(2, np.int32), np.zeros(1, np.uint8)) if tokenizer is None else token_bytes(tokenizer)
    page, lower, kind = characters()
    weights = word_weights([]) if weights is None else weights
    hashed = {hash_word(word): weight for word, weight in weights.items() if word}
    known = np.sort(np.fromiter(hashed, np.uint32))
    forms = {hash_word(form): hash_word(base) for form, base in _forms().items()}
    sources = np.sort(np.fromiter(forms, np.uint32))
    return Table(
        starts,
        data,
        page,
        lower,
        kind,
        sources,
        np.array([forms[int(one)] for one in sources], np.uint32),
        known,
        np.array([hashed[int(one)] for one in known], np.float32),
        np.float32(weights[""]),
        _hashes(SPOKEN),
        _hashes(WRITTEN),
        _hashes(NEGATING),
    )


def token_bytes(tokenizer: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of every id, end to end: (starts [V+1], bytes), from the text of a tokenizer.json.

    Both kinds of BPE are read: byte-level ones (GPT-2's spelling of bytes) and those of SentencePiece, where "▁" is a
    space and "<0x0A>" a byte. Special ids have no bytes; other added tokens have those of their text.
    """
    content = json.loads(tokenizer)
    model = content["model"]
    decoder = json.dumps(content.get("decoder") or {})
    if model.get("type", "BPE") != "BPE" or not ("ByteLevel" in decoder or "ByteFallback" in decoder):
        raise ValueError("a byte-level or byte-fallback BPE tokenizer is asked for")
    spelled = _byte_letters() if "ByteLevel" in decoder else None
    pieces: dict[int, bytes] = {}
    for token, number in model["vocab"].items():
        if spelled is None:
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            pieces[number] = bytes([int(token[3:5], 16)]) if byte else token.replace("▁", " ").encode()
        elif all(letter in spelled for letter in token):
            pieces[number] = bytes(spelled[letter] for letter in token)
        else:  # not a spelling of bytes: the decoder leaves it as it is
            pieces[number] = token.encode()
    for added in content.get("added_tokens", ()):
        pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    every = [pieces.get(number, b"") for number in range(max(pieces) + 1)]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in every])]).astype(np.int32)
    return starts, np.frombuffer(b"".join(every) or b"\0", np.uint8)


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


@lru_cache(maxsize=1)
def characters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower case and kinds of all code points, from Python's own tables: (page, lower, kind), distinct pages once.

    Lower-casing is by code point: a capital sigma is always "σ", and so is the final one; "İ" is "i".
    """
    every = list(map(chr, range(0x110000)))
    lower = np.fromiter((ord(one.lower()[0]) for one in every), np.int32)
    lower[ord("ς")] = ord("σ")
    kind = WORD * np.fromiter(map(str.isalnum, every), np.int32)
    kind[ord("_")] = WORD  # as \w of `re`
    kind |= SPACE * np.fromiter(map(str.isspace, every), np.int32)
    kind |= LOWER * np.fromiter(map(str.islower, every), np.int32)
    kind |= DIGIT * np.fromiter(map(str.isdecimal, every), np.int32)
    for first, last in SCRIPTS_WITHOUT_SPACES:
        kind[first : last + 1] |= ALONE * (kind[first : last + 1] & WORD)
    for letters, bit in (
        (".!?…", STOP),
        ("。！？", STOP_CJK),
        (")]}'’*`", CLOSER),
        ("'’`", APOSTROPHE),
        ("\n\r\u2028\u2029", NEWLINE),
    ):
        kind[[ord(one) for one in letters]] |= bit
    for mark, number in MARKS.items():
        kind[ord(mark)] |= number << MARK
        kind[ord(mark)] |= CLOSER
    both = np.concatenate([(lower - np.arange(len(lower))).reshape(-1, PAGE), kind.reshape(-1, PAGE)], axis=1)
    distinct, page = np.unique(both, axis=0, return_inverse=True)
    return page.reshape(-1).astype(np.int32), distinct[:, :PAGE].astype(np.int32), distinct[:, PAGE:].astype(np.int32)


def hash_word(word: str) -> int:
    """The hash of a word as it stands, 32 bits."""
    total = 0
    for place, letter in enumerate(word):
        total += _spread(ord(letter)) * pow(BASE, place, 1 << 32)
    return (total & 0xFFFFFFFF) or 1


def _spread(point: int) -> int:
    mixed = (point + 1) * SPREAD & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


def stem(word: str) -> str:
    """The stem of a word in lower case: endings of plural, past, -ing, -ly, and a last e or y go. Always a prefix."""

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
    """What a word of a caption, in lower case, is known by: its stem, or the stem of what that is a form of."""
    return _forms().get(stem(word), stem(word))


def _hashes(words: str) -> np.ndarray:
    return np.unique(np.array([hash_word(meaning(word)) for word in words.split()], np.uint32))


def letters_of(text: str) -> np.ndarray:
    """The word characters of a text in lower case, as code points: how R_D compares lines."""
    page, lower, kind = characters()
    points = code_points([text])[0][0]
    points = points[(kind[page[points >> 8], points & (PAGE - 1)] & WORD) > 0]
    return points + lower[page[points >> 8], points & (PAGE - 1)]


def stems_of(table: Table, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The stem hashes of a text's words, and how much each says."""
    stems = np.array([hash_word(meaning(word)) for word in words_of(text)], np.uint32)
    at = np.minimum(np.searchsorted(table.known, stems), len(table.known) - 1)
    return stems, np.where(table.known[at] == stems, table.weight[at], table.unknown).astype(np.float32)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, as `read` cuts them: apostrophes go, characters of Chinese stand alone."""
    page, lower, kind = characters()
    words, before = [], 0
    points = [ord(one) for one in text]
    kinds = [int(kind[page[point >> 8], point & 255]) for point in points]
    for place, (point, here) in enumerate(zip(points, kinds)):
        if here & WORD:
            letter = chr(point + int(lower[page[point >> 8], point & 255]))
            joined = before & WORD or (place > 1 and before & APOSTROPHE and kinds[place - 2] & WORD)
            if words and joined and not here & ALONE and not kinds[place - 1 if before & WORD else place - 2] & ALONE:
                words[-1] += letter
            else:
                words.append(letter)
        before = here
    return words


def word_weights(texts: Iterable[str]) -> dict[str, float]:
    """How much each stem says: log((n + 20) / (texts with it + 1.6)); function words nothing; "" is any other stem.

    It is as if 20 more texts had each word 1.6 times, so that few texts do not make all their words common. Colours,
    sides, numbers and the like (EXCLUSIVE), one of which in place of another is an untruth, weigh at least 2.5, which
    is what all words weigh where there are no texts.
    """
    texts = list(texts)
    counts = Counter(one for text in texts for one in {meaning(word) for word in words_of(text)})
    weights = {one: math.log((len(texts) + 20) / (count + 1.6)) for one, count in counts.items()}
    unknown = math.log((len(texts) + 20) / 1.6)
    exclusive = {one: max(weights.get(one, unknown), EXCLUSIVE_WEIGHT) for one in map(meaning, EXCLUSIVE.split())}
    return weights | dict.fromkeys(map(meaning, FUNCTION.split()), 0.0) | exclusive | {"": unknown}


def code_points(texts: Sequence[str], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Texts as padded code points [n, size], composed (NFC) as tokenizers do, and their lengths, not cut."""
    points = [
        np.frombuffer(unicodedata.normalize("NFC", text).encode("utf-32-le", "surrogatepass"), np.uint32)
        for text in texts
    ]
    lengths = np.array([len(one) for one in points], np.int32)
    size = size or max(1, *lengths)
    padded = np.zeros((len(points), size), np.int32)
    for row, one in zip(padded, points):
        row[: len(one)] = one[:size]
    return padded, lengths


@partial(jax.jit, static_argnums=3)
def _read_points(table: Table, points: jax.Array, lengths: jax.Array, limits: Limits) -> Caption:
    return jax.vmap(partial(parse, limits=limits), in_axes=(None, 0, 0))(table, points, lengths)


def read_texts(table: Table, texts: Sequence[str], limits: Limits) -> Caption:
    """Texts of the host read as captions are: leaves are numpy arrays with a leading axis of texts."""
    points, lengths = code_points(texts, limits.characters)
    return jax.tree.map(np.asarray, _read_points(table, points, lengths, limits))


# On the device: one caption.


def read(table: Table, ids: Int[Array, "C"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Read one caption from its first `length` token ids."""
    points, points_length = decode(table, ids, length, limits.characters)
    return parse(table, points, points_length, limits)


def decode(
    table: Table, ids: Int[Array, "C"], length: Int[Array, ""], size: int
) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """Token ids to at most `size` code points, and how many there are (more than `size` where they are cut).

    Bytes that are not UTF-8 become U+FFFD as Python's `errors="replace"` has it.
    """
    room = 4 * size if size < 2048 else 2 * size + 4096  # bytes: text that is not Latin takes up to three each
    valid = (jnp.arange(len(ids)) < length) & (ids >= 0) & (ids < len(table.starts) - 1)
    known = jnp.where(valid, ids, 0)
    begin = table.starts[known]
    count = jnp.where(valid, table.starts[known + 1] - begin, 0)
    ends = jnp.cumsum(count)
    place = jnp.arange(room)
    token = jnp.zeros(room + 1, jnp.int32).at[jnp.minimum(ends, room)].add(1)
    token = jnp.minimum(jnp.cumsum(token[:room]), len(ids) - 1)
    byte = table.data[jnp.clip(begin[token] + place - (ends - count)[token], 0, len(table.data) - 1)].astype(jnp.int32)
    inside = place < ends[-1]
    byte = jnp.where(inside, byte, 0)
    one, two, three = (jnp.concatenate([byte[k:], jnp.zeros(k, jnp.int32)]) for k in (1, 2, 3))
    need = (byte >= 0xC2).astype(jnp.int32) + (byte >= 0xE0) + (byte >= 0xF0)
    need = jnp.where(byte > 0xF4, 0, need)
    least = jnp.where(byte == 0xE0, 0xA0, jnp.where(byte == 0xF0, 0x90, 0x80))
    most = jnp.where(byte == 0xED, 0x9F, jnp.where(byte == 0xF4, 0x8F, 0xBF))
    right = [(one >= least) & (one <= most), (two & 0xC0) == 0x80, (three & 0xC0) == 0x80]
    follow = jnp.zeros_like(byte)  # bytes after this one that belong to its character
    for k, fits in enumerate(right):
        follow = jnp.where((follow == k) & (need > k) & fits, k + 1, follow)
    taken = jnp.zeros(room, bool)
    for k in (1, 2, 3):
        taken |= jnp.concatenate([jnp.zeros(k, bool), follow[:-k] >= k])
    tail = [byte & 0x1F, byte & 0x0F, byte & 0x07]
    point = jnp.select(
        [need == 0, need == 1, need == 2],
        [
            byte,
            (tail[0] << 6) | (one & 0x3F),
            (tail[1] << 12) | ((one & 0x3F) << 6) | (two & 0x3F),
        ],
        (tail[2] << 18) | ((one & 0x3F) << 12) | ((two & 0x3F) << 6) | (three & 0x3F),
    )
    point = jnp.where((follow < need) | ((need == 0) & (byte >= 0x80)), REPLACEMENT, point)
    points, total = compact(inside & ~taken, point, size)
    # What lies beyond the bytes that are looked at is not counted but known to be there.
    return points, jnp.where(ends[-1] > room, jnp.maximum(total, size + 1), total)


def compact(mask: Bool[Array, "n"], values: Array, size: int) -> tuple[Array, Int[Array, ""]]:
    """The values under a mask one after another, zeros behind them, and how many there are (which may exceed size)."""
    count = jnp.cumsum(mask)
    at = jnp.where(mask, count - 1, size)
    return jnp.zeros(size, values.dtype).at[at].set(values, mode="drop"), count[-1]


def parse(table: Table, points: Int[Array, "N"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Read one caption from its code points; `length` may exceed what there is of them."""
    places = jnp.arange(len(points), dtype=jnp.int32)
    inside = places < length
    points = jnp.where(inside, points, 0)
    page, place = table.page[points >> 8], points & (PAGE - 1)
    kind = jnp.where(inside, table.kind[page, place], SPACE)
    lower = points + table.lower[page, place]
    letter = (kind & WORD) > 0
    letters_before = jnp.cumsum(letter) - letter
    letters, total = compact(letter, lower, len(points))

    # words
    before, before2 = _shift(kind, 1), _shift(kind, 2)
    bridged = ((before & APOSTROPHE) > 0) & ((before2 & WORD) > 0)
    last = jnp.where(bridged, before2, before)
    joined = ((last & WORD) > 0) & ((last & ALONE) == 0) & ((kind & ALONE) == 0)
    first = letter & ~joined
    word_start, words = compact(first, places, limits.words)
    begin, _ = compact(first, letters_before.astype(jnp.int32), limits.words + 1)
    begin = jnp.where(jnp.arange(limits.words + 1) < words, begin, total)
    real = jnp.arange(limits.words) < words
    stems = jnp.where(real, _meaning(table, letters, begin[:-1], begin[1:]), 0)
    weights = jnp.where(real, weight_of(table, stems), 0)

    # quoted lines
    found, found_end, marks = _pair(kind, places, inside, length, 2 * limits.quotes)
    cut = marks > 2 * limits.quotes
    is_quote = found_end > found
    delta = jnp.zeros(len(points) + 1, jnp.int32)
    delta = delta.at[jnp.where(is_quote, found, len(points))].add(1)
    delta = delta.at[jnp.where(is_quote, found_end, len(points))].add(-1)
    quoted = jnp.cumsum(delta[:-1]) > 0
    count_before = jnp.append(letters_before, total).astype(jnp.int32)
    line_begin, line_end = count_before[found], count_before[found_end]
    is_quote &= line_end > line_begin  # a line that is empty when normalised is none
    sentence = _sentences(kind, quoted)
    speakers, speaker_weights, is_written = _speakers(
        table, (stems, weights, word_start, real), quoted, sentence, (found, found_end, is_quote)
    )
    is_quote &= ~is_written
    order, quotes = compact(is_quote, jnp.arange(len(found), dtype=jnp.int32), limits.quotes)
    real_quote = jnp.arange(limits.quotes) < quotes

    def keep(values: Array) -> Array:
        kept = values[order]
        return jnp.where(real_quote.reshape(-1, *[1] * (kept.ndim - 1)), kept, 0)

    line_length = keep(line_end - line_begin)
    columns = jnp.arange(limits.line)
    at = keep(line_begin)[:, None] + columns
    lines = jnp.where(columns < line_length[:, None], letters[jnp.minimum(at, len(points) - 1)], 0)
    return Caption(
        points,
        jnp.minimum(length, len(points)).astype(jnp.int32),
        letters,
        stems,
        weights,
        word_start,
        jnp.minimum(words, limits.words),
        _negated(table, stems, quoted[word_start]),
        keep(found),
        keep(found_end),
        jnp.minimum(quotes, limits.quotes),
        lines,
        jnp.minimum(line_length, limits.line),
        keep(speakers),
        keep(speaker_weights),
        (length > len(points))
        | (words > limits.words)
        | cut
        | (quotes > limits.quotes)
        | jnp.any(line_length > limits.line),
    )


def _shift(values: Array, by: int) -> Array:
    """Each place sees the value `by` places before it (after it where negative); beyond the text lies a space."""
    edge = jnp.full(abs(by), SPACE, values.dtype)
    return jnp.concatenate([edge, values[:-by]]) if by > 0 else jnp.concatenate([values[-by:], edge])


def contains(ordered: Int[Array, "n"], values: Array) -> Array:
    """Which values are in a sorted array."""
    at = jnp.minimum(jnp.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[at] == values


def weight_of(table: Table, stems: Array) -> Array:
    """How much stems say."""
    at = jnp.minimum(jnp.searchsorted(table.known, stems), len(table.known) - 1)
    return jnp.where(table.known[at] == stems, table.weight[at], table.unknown)


def _meaning(table: Table, letters: Array, begin: Array, end: Array) -> Array:
    """As `meaning`, of the words at letters[begin:end]."""
    n = len(letters)
    powers = np.cumprod(np.r_[1, np.full(n - 1, BASE)].astype(np.uint32), dtype=np.uint32)
    inverse = np.cumprod(np.r_[1, np.full(n - 1, pow(BASE, -1, 1 << 32))].astype(np.uint32), dtype=np.uint32)
    mixed = (letters.astype(jnp.uint32) + 1) * np.uint32(SPREAD)
    sums = jnp.cumsum((mixed ^ (mixed >> 15)) * powers, dtype=jnp.uint32)
    sums = jnp.concatenate([jnp.zeros(1, jnp.uint32), sums])

    length = end - begin

    def ends_with(ending: str, least: int) -> Array:
        fits = length >= least
        for k, letter in enumerate(reversed(ending), start=1):
            fits &= letters[jnp.clip(begin + length - k, 0, n - 1)] == ord(letter)
        return fits

    def last(k: int) -> Array:
        return letters[jnp.clip(begin + length - k, 0, n - 1)]

    def one_of(value: Array, several: str) -> Array:
        return (value[..., None] == np.array([ord(one) for one in several])).any(-1)

    length = length - (ends_with("s", 4) & ~one_of(last(2), "sui"))
    ing = ends_with("ing", 6)
    ed = ends_with("ed", 5)
    length = length - jnp.where(ing, 3, jnp.where(ed, 2, 0))
    doubled = (ing | ed) & (last(1) == last(2)) & ~one_of(last(1), "lsz")
    length = length - jnp.where(doubled, 1, jnp.where(~doubled & ends_with("ly", 6), 2, 0))
    length = length - ends_with("e", 4)
    length = length - (ends_with("y", 4) | ends_with("i", 4))
    begin = jnp.clip(begin, 0, n - 1)
    hashed = (sums[jnp.clip(begin + length, 0, n)] - sums[begin]) * jnp.asarray(inverse)[begin]
    hashed = jnp.where(hashed == 0, 1, hashed)
    at = jnp.minimum(jnp.searchsorted(table.forms, hashed), len(table.forms) - 1)
    return jnp.where(table.forms[at] == hashed, table.becomes[at], hashed)


def _pair(kind: Array, places: Array, inside: Array, length: Array, most: int) -> tuple[Array, Array, Array]:
    """Quotation marks to quoted spans: (start, end, number of marks), start = end where there is none.

    A mark opens a quote where none is open and closes it where one is, and a quote that nobody closes ends with its
    line. Beyond that: the corner brackets of Chinese close each other only; a straight mark after a digit is an inch
    mark, unless a word follows; a right mark that stands like a closing one does not open; what opens with a left mark
    is closed by a right one if one comes before the next left one, so that other marks may stand inside.
    """
    size = most + 1
    mark = kind >> MARK
    at, marks = compact(mark > 0, places, size)
    here = jnp.arange(size) < jnp.minimum(marks, most)
    type_ = jnp.where(here, mark[at], 0)
    before, after = _shift(kind, 1)[at], _shift(kind, -1)[at]
    line = jnp.cumsum((kind & NEWLINE) > 0)
    line_end = jnp.searchsorted(line, line[at] + 1).astype(jnp.int32)  # the line break itself
    line_end = jnp.minimum(line_end, jnp.minimum(length, len(kind)).astype(jnp.int32))

    # Whether, later in the line, a right mark comes before a left one, and whether a straight one comes at all.
    def look(later: tuple, one: tuple) -> tuple:
        of_line, right, straight = later
        own, number = one
        right &= own == of_line
        straight &= own == of_line
        curly = (number == LEFT) | (number == RIGHT)
        seen = (own, jnp.where(curly, number == RIGHT, right), straight | (number == STRAIGHT))
        return seen, (right, straight)

    lines = jnp.where(here, line[at], -1)
    _, (right_next, straight_next) = jax.lax.scan(
        look, (jnp.int32(-2), False, False), (lines.astype(jnp.int32), type_), reverse=True
    )
    inch = (type_ == STRAIGHT) & ((before & DIGIT) > 0) & ((after & WORD) == 0)
    closing = (type_ == RIGHT) & ((before & SPACE) == 0) & ((after & WORD) == 0)
    opens = here & ((type_ == STRAIGHT) & ~inch | (type_ == LEFT) | (type_ == RIGHT) & ~closing)
    opens |= (type_ == CORNER) | (type_ == WHITE)
    stands_left = ((before & SPACE) > 0) & ((after & WORD) > 0)
    nests = (type_ == LEFT) & stands_left & right_next & straight_next

    def step(state: tuple, one: tuple) -> tuple:
        start, stop, opener, nested = state  # of the open quote; opener 0: none
        place, stop_here, number, may_open, right_later, nesting = one
        over = (opener > 0) & (stop != stop_here)  # its line has ended: it ended there
        emitted = (jnp.where(over, start, 0), jnp.where(over, stop, 0))
        opener, nested = jnp.where(over, 0, opener), nested & ~over
        plain = (number >= STRAIGHT) & (number <= RIGHT)
        enters = (opener == STRAIGHT) & nesting & ~nested
        closes = jnp.select(
            [opener == CORNER, opener == WHITE, opener == LEFT, opener == STRAIGHT],
            [
                number == CORNER_END,
                number == WHITE_END,
                (number == RIGHT) | (plain & ~right_later),
                plain & ~enters & ~(nested & (number == RIGHT)),
            ],
            (opener == RIGHT) & plain,
        )
        leaves = nested & (number == RIGHT)
        emitted = jax.tree.map(lambda a, b: jnp.where(closes, b, a), emitted, (start, place))
        opening = (opener == 0) & may_open
        state = (
            jnp.where(opening, place + 1, start),
            jnp.where(opening, stop_here, stop),
            jnp.where(opening, number, jnp.where(closes, 0, opener)),
            (nested | enters) & ~leaves & ~closes,
        )
        return state, emitted

    start = (jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.array(False))
    # Places past the last mark have kind 0 and the end of no line, which ends what is open.
    stops = jnp.where(here, line_end, -1)
    _, (found, found_end) = jax.lax.scan(step, start, (at, stops, type_, opens, right_next, nests))
    return found, found_end, marks


def _sentences(kind: Array, quoted: Array) -> Array:
    """The number of the sentence that each place is in.

    One begins at a line break; at a space after . ! ? … (and what closes behind it) unless a lower-case letter
    follows; and right after the full stops of Chinese. Never inside a quote.
    """

    def after_stop(bit: int) -> Array:
        ended, open_ = jnp.zeros(len(kind), bool), jnp.ones(len(kind), bool)
        for k in (1, 2, 3):
            one = _shift(kind, k)
            ended |= open_ & ((one & bit) > 0)
            open_ &= (one & CLOSER) > 0
        return ended

    next_, next2 = _shift(kind, -1), _shift(kind, -2)
    follows = jnp.where((next_ & SPACE) > 0, next2, next_)
    latin = ((kind & SPACE) > 0) & after_stop(STOP) & ((follows & LOWER) == 0)
    chinese = after_stop(STOP_CJK) & ((kind & CLOSER) == 0)
    begins = ((kind & NEWLINE) > 0) | ((latin | chinese) & ~quoted)
    return jnp.cumsum(begins)


def _speakers(table: Table, words: tuple, quoted: Array, sentence: Array, spans: tuple) -> tuple[Array, Array, Array]:
    """The speaker phrase of each quote: stems and weights, and whether the quote is on-screen text.

    The phrase is the words of the quote's sentence outside of quotes: up to 24 before it, back to the quote before,
    and up to 8 after it, unless another quote follows in the sentence and so owns them. Where these say nothing, up
    to 12 words of the sentence before. Words that only say that something is spoken or written weigh nothing.
    """
    stems, weights, word_start, real = words
    start, end, is_quote = spans
    n, size = len(quoted), len(stems)
    here = real & ~quoted[word_start]
    order, outside = compact(here, jnp.arange(size, dtype=jnp.int32), size)
    place = jnp.where(jnp.arange(size) < outside, word_start[order], n)
    place_sentence = sentence[jnp.minimum(place, n - 1)]
    starts = jnp.sort(jnp.where(is_quote, start, n))
    opened = jnp.searchsorted(starts, place)  # how many quotes begin before each word
    before = jnp.searchsorted(place, start)  # words outside of quotes before each quote
    quote = jnp.searchsorted(starts, start)
    own = sentence[jnp.clip(start - 1, 0, n - 1)]
    then = sentence[jnp.clip(end, 0, n - 1)]
    following = jnp.append(starts, n)[quote + 1]
    owned = (following < n) & (sentence[jnp.clip(following - 1, 0, n - 1)] == then)

    def pick(at: Array, wanted: Array) -> tuple[Array, Array]:
        fits = (at >= 0) & (at < outside) & wanted
        word = order[jnp.clip(at, 0, size - 1)]
        return jnp.where(fits, stems[word], 0), jnp.where(fits, weights[word], 0.0)

    def at_word(values: Array, at: Array) -> Array:
        return values[jnp.clip(at, 0, size - 1)]

    back = before[:, None] - 1 - jnp.arange(BEFORE)
    in_front = (at_word(place_sentence, back) == own[:, None]) & (at_word(opened, back) == quote[:, None])
    ahead = before[:, None] + jnp.arange(AFTER)
    behind = (at_word(place_sentence, ahead) == then[:, None]) & (at_word(opened, ahead) == quote[:, None] + 1)
    behind &= ~owned[:, None]
    first, first_weight = pick(back, in_front)
    second, second_weight = pick(ahead, behind)

    def says_who(phrase: Array, weight: Array) -> Array:
        return jnp.where(contains(table.spoken, phrase) | contains(table.written, phrase), 0.0, weight)

    near = jnp.sum(says_who(first, first_weight), -1) + jnp.sum(says_who(second, second_weight), -1)
    skipped = jnp.sum(at_word(place_sentence, back) == own[:, None], -1)
    far = before[:, None] - 1 - skipped[:, None] - jnp.arange(BEFORE)
    there = at_word(place_sentence, before - 1 - skipped)[:, None]
    third, third_weight = pick(far, at_word(place_sentence, far) == there)
    bare = (near <= 0)[:, None]
    phrase = jnp.concatenate([jnp.where(bare, third, first), second], -1)
    weight = jnp.concatenate([jnp.where(bare, third_weight, first_weight), second_weight], -1)
    repeats = jnp.tril(phrase[:, :, None] == phrase[:, None, :], -1).any(-1)
    weight = jnp.where(repeats, 0.0, weight)
    nearby = jnp.concatenate([first, second], -1)
    is_written = contains(table.written, nearby).any(-1) & ~contains(table.spoken, nearby).any(-1)
    return phrase, says_who(phrase, weight), is_written  # a word that stands twice weighs once


def _negated(table: Table, stems: Array, quoted: Array) -> Array:
    """Words with a negation among the three before them, both outside of quotes."""
    negation = contains(table.negating, stems) & ~quoted
    near = jnp.zeros(len(stems), bool)
    for k in (1, 2, 3):
        near |= jnp.concatenate([jnp.zeros(k, bool), negation[:-k]])
    return near & ~quoted

"""Estimate the limits of texts on the host. Limits take few sizes, so that few programs are compiled."""

import re
from collections.abc import Iterable, Sequence

from avocado_jax.rewards.lexicon import CLASSES
from avocado_jax.rewards.text import Limits
from avocado_jax.rewards.vocabulary import MARKS, SCRIPTS_WITHOUT_SPACES, meaning

MOST = 32768  # maximum characters of a text
SIZES = (32, 512), (64, 2048)  # (lines of dialogue, characters of a line)
A_WORD = re.compile("[{0}]|[^\\W{0}]+".format("".join(f"{chr(a)}-{chr(b)}" for a, b in SCRIPTS_WITHOUT_SPACES)))
A_SINGLE_MARK = re.compile(r"\B['‘’*]|['‘’*]\B")
AFTER = r"\s.,!?…;:)\]}"  # characters that may follow a closing mark
A_DOUBLE_QUOTE = re.compile(  # from a possible opening mark up to the next mark or the end of the paragraph
    "(?:(?<!\\S)[{0}]|[{0}](?![{1}]|$))((?:[^{0}\n]|\n(?!\n))*)".format("".join(MARKS), AFTER)
)
A_SINGLE_QUOTE = re.compile(rf"(?<!\w)['‘*](?=\w)(.*?)(?:['’*](?=[{AFTER}]|$)|$)", re.MULTILINE)
A_SCRIPT = re.compile(r"^(.*?)(?::(?=[\s*])|：)(.*)$", re.MULTILINE)  # a name, a colon and the rest of the line
BRACKETED = re.compile(r"[(\[][^()\[\]]*[)\]]")
A_NAME = re.compile(r"[^\W\d_]+")
A_SENTENCE = re.compile(r"(?<=[.!?…。！？])\s")
PERSONS, VERBS = ({meaning(word) for word in CLASSES[name].split()} for name in ("PERSON", "SAYS"))


def limits_of(texts: Sequence[str], dialogues: Iterable[Sequence[str]] = ()) -> Limits:
    """Compute limits that fit the texts.

    The maximum is 32,768 characters, 64 lines and 2,048 characters of a line. Longer texts are truncated, which bounds
    the cost of a text.

    Args:
        texts: captions.
        dialogues: the lines of dialogue of each clip.
    """
    characters = _power_of_two(1024, map(len, texts), MOST)
    texts = [text[:characters].replace("''", '"').replace("&quot;", '"') for text in texts]
    words = _power_of_two(characters // 4, (len(A_WORD.findall(text)) for text in texts), characters)
    double = (sum(map(text.count, MARKS)) for text in texts)
    single = (len(A_SINGLE_MARK.findall(text)) for text in texts)
    script = (sum(map(text.count, (": ", ":\n", ":*", "："))) for text in texts)  # `Speaker: text` has no marks
    spoken = (pair // 2 + more // 2 + colons for pair, more, colons in zip(double, single, script))
    dialogues = list(dialogues)
    count = max([0, *spoken, *map(len, dialogues)])
    longest = max([0, *map(_longest_line, texts), *(len(line) for lines in dialogues for line in lines)])
    quotes, line = next((size for size in SIZES if count <= size[0] and longest <= size[1]), SIZES[-1])
    return Limits(characters, words, quotes, line)


def _power_of_two(least: int, needed: Iterable[int], most: int) -> int:
    return min(most, max(least, 1 << (max([1, *needed]) - 1).bit_length()))


def _longest_line(text: str) -> int:
    """An upper estimate of the characters of a text's longest line of dialogue."""
    found = [*A_DOUBLE_QUOTE.findall(text), *A_SINGLE_QUOTE.findall(text)]
    for head, rest in A_SCRIPT.findall(text):
        name = A_NAME.findall(BRACKETED.sub("", head))[-1:]
        if name and (stem := meaning(name[0].lower())) in PERSONS | VERBS:
            found.append(rest if stem in PERSONS else A_SENTENCE.split(rest, maxsplit=1)[0])
    return max(map(len, found), default=0)

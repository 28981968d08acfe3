"""Reference implementation in plain Python: which quotes are speech, and which form one line."""

from quoting import (
    CLASSES,
    DOUBLE,
    ENDS,
    FUNCTION,
    LEAD,
    LINE_BREAKS,
    STOPS,
    Text,
    is_alone,
    is_word,
    sentences,
    spans,
)
from quoting import normalize as normalize

from avocado_jax.rewards.attribution import AFTER, BEFORE
from avocado_jax.rewards.vocabulary import meaning


def read(text):
    t = Text(text)
    every = spans(t)
    sent = sentences(t, every)
    words = [(p, w) for p, w in t.words if not any(s.start <= p < s.end for s in every)]
    spoken, loose = [], []  # of each span
    for number in range(len(every)):
        one, other = is_spoken(t, every, sent, words, number, spoken)
        spoken.append(one)
        loose.append(other)
    single = [s.kind == "single" for s in every]
    if sum(a and b for a, b in zip(spoken, single)) > sum(a and not b for a, b in zip(spoken, single)):
        spoken = loose
    lines = []
    last = None
    for number, (s, yes) in enumerate(zip(every, spoken)):
        if not yes:
            last = None
            continue
        if last is not None and continues(t, every, sent, words, number):
            lines[-1].append(s)
        else:
            lines.append([s])
        last = s
    return t, every, spoken, lines


def continues(t, every, sent, words, number):
    """Whether a quote goes on with the line before it: "Open it," she says, "before they come back." """
    a, b = every[number - 1], every[number]
    text = t.text
    if a.kind != "double" or b.kind != "double" or text[a.start : a.end].rstrip(" `*")[-1:] not in (",", "，"):
        return False
    begins = text[b.start : b.end].lstrip(" `*")[:1]
    between = [w for p, w in words if a.end <= p < b.start]
    return (
        begins.islower()
        and sent[min(a.end, len(sent) - 1)] == sent[b.start - 1]
        and 0 < len(between) <= 6
        and any(w in CLASSES["SPOKEN"] for w in between)
        and not any(w in CLASSES["CONJUNCTION"] for w in between)
    )


def is_spoken(t, every, sent, words, number, earlier):
    s = every[number]
    text = t.text
    if s.kind == "script":
        return True, True
    previous = every[number - 1] if number else None
    after_last = previous.start if previous else -1
    here = sent[max(s.start - 1, 0)]
    front = [w for p, w in words if after_last < p < s.start and sent[p] == here][-BEFORE:]
    then = sent[min(s.end, len(text) - 1)]
    following = every[number + 1].start if number + 1 < len(every) else len(text)
    behind = []
    if number + 1 == len(every) or sent[following - 1] != then:
        behind = [w for p, w in words if s.start < p < following and sent[p] == then][:AFTER]
    # the character before the opening mark
    index = s.start - 1
    while index >= 0 and not (is_word(text[index]) or text[index].isspace() or text[index] in LEAD + STOPS):
        index -= 1
    while index >= 0 and text[index].isspace() and text[index] not in LINE_BREAKS:
        index -= 1
    before = text[index] if index >= 0 else "\n"
    glued = is_word(before) and not is_alone(before)
    inside = text[s.start : s.end].strip(" `*")
    ended = inside[-1:] in tuple(ENDS)
    few = sum(s.start <= p < s.end for p, _ in t.words) <= 3
    content = [w for w in front if w not in FUNCTION]
    adjacent = glued and bool(content) and content[-1] in CLASSES["SPOKEN"]

    def last(classes, upto=None):
        places = [i for i, w in enumerate(front[:upto]) if any(w in CLASSES[c] for c in classes)]
        return places[-1] if places else -1

    # brackets
    line_begin = next((p + 1 for p in range(s.start - 1, -1, -1) if text[p] in LINE_BREAKS), 0)
    opening, closing = text.rfind("(", line_begin, s.start), text.rfind(")", line_begin, s.start)
    if opening > closing and not any(w in CLASSES["SPOKEN"] for p, w in words if opening < p < s.start):
        return False, False
    spoken, written = last(["SPOKEN"]), last(["WRITTEN"])
    reading = meaning("read")
    if written >= 0 and front[written] == reading and written > 0 and front[written - 1] in CLASSES["PERSON"]:
        spoken, written = max(spoken, written), last(["WRITTEN"], written)
    if written >= 2 and front[written - 1] == "and" and front[written - 2] in CLASSES["SPOKEN"]:
        written = -1
    if last(["SUBTITLE"]) > written and spoken < 0:
        written = last(["SUBTITLE"])
    naming = glued and front and front[-1] in CLASSES["NAMING"]
    if meaning("aloud") in front:
        verdict = True
    elif naming:
        verdict = False
    elif written >= 0:
        verdict = spoken > written and last(["PERSON", "SOURCE", "CONJUNCTION"], spoken) > written
    elif spoken >= 0:
        verdict = adjacent or not glued or (ended and not few)
    else:
        verdict = None
    if (
        verdict is None
        and previous is not None
        and sent[min(previous.end, len(sent) - 1)] == here
        and all(
            w in FUNCTION and w not in CLASSES["CONJUNCTION"] - {"and"} for p, w in words if previous.end <= p < s.start
        )
    ):
        verdict = earlier[-1] and s.kind in (previous.kind, "double")
        return verdict, verdict
    strong = verdict is True
    if verdict is None and not glued:
        for w in behind:
            if w in CLASSES["SPOKEN"] or w in CLASSES["WRITTEN"]:
                verdict = w in CLASSES["SPOKEN"]
                break
    if verdict is None:
        index = s.end
        while index < len(text) and (text[index] in "`*'’" or text[index] in DOUBLE):
            index += 1
        while index < len(text) and text[index].isspace() and text[index] not in LINE_BREAKS:
            index += 1
        after = t.at(index)
        verdict = not (glued or (after.islower() and not ended))
    if s.kind == "single":
        attributed = (
            adjacent and content[-1] in CLASSES["SAYS"] and (ended or text[s.end : s.end + 1] == "*")
        ) or before in LEAD + STOPS + LINE_BREAKS
        full = inside[-1:] in tuple(STOPS) and not few
        return verdict and attributed and (strong or full), verdict and attributed
    return verdict, verdict


def quotes(text):
    return [" ".join(text[s.start : s.end] for s in line) for line in read(text)[3]]

"""Explain scores in words."""

from collections.abc import Mapping, Sequence

import numpy as np

from avocado_jax.rewards.checklist import BLOCK, DIMENSIONS, WINDOW, dimension_scores
from avocado_jax.rewards.combine import References, Scored
from avocado_jax.rewards.dialogue import TIE, UNIT
from avocado_jax.rewards.text import Caption

SHOWN = 60  # characters of a quotation
EXTRA = {"timing": "Time IoU of the scenes", "probes": "Probes answered rightly"}


def explain(
    caption: Caption,
    reference: References,
    scored: Scored,
    keypoints: Sequence[Mapping[str, str]],
    dialogues: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """Describe the matches: lines with their speakers, keypoints with the words that state them.

    Args:
        caption, reference, scored: of one caption, as numpy arrays.
        keypoints: the reference's {"text"}.
        dialogues: {"speaker", "text"} of the reference lines that were compared; the speaker may be empty.
    """
    terms = {name: float(value) for name, value in scored.terms.items()}
    sentences = [
        f"R_C {_number(terms['checklist'])}, R_D {_number(terms['dialogue'])}, R_L {_number(terms['length'])}."
    ]
    sentences += [f"{title} {_number(terms[name])}." for name, title in EXTRA.items() if name in terms]
    sentences += ["The caption falls into repetition."] * (terms["repetition"] < 0)
    sentences += ["Something did not fit the limits and was left out."] * (terms["truncated"] > 0)
    sentences += _dialogue(caption, reference, scored, dialogues)
    by_dimension = zip(DIMENSIONS, np.asarray(dimension_scores(scored.keypoints, reference.keypoints)))
    sentences += [f"Keypoints, {name}: {value:.2f}." for name, value in by_dimension if not np.isnan(value)]
    for number, point in enumerate(keypoints[: int(reference.keypoints.count)]):
        answer, block = float(scored.keypoints[number]), int(scored.verdict.block[number])
        sentence = f'Keypoint {number + 1}, "{_short(point["text"])}": {_number(answer)}'
        if answer > 0:
            first, last = max(block - WINDOW + 1, 0) * BLOCK, (block + 1) * BLOCK
            end = caption.word_start[last] if last < caption.words else caption.length
            found = _short(_text(caption, caption.word_start[first], end))
            sentence += f', {float(scored.verdict.coverage[number]):.2f} of it in "{found}"'
            if scored.verdict.ordered[number] < 1:
                sentence += f", {float(scored.verdict.ordered[number]):.2f} of the others on its right side"
        sentences.append(sentence + ".")
    return sentences


def _dialogue(
    caption: Caption, reference: References, scored: Scored, dialogues: Sequence[Mapping[str, str]]
) -> list[str]:
    quotes, lines = int(caption.quotes), int(reference.dialogue.count)
    if lines < 0:
        return ["There is no dialogue to compare with."]
    spoken = [_text(caption, *span) for span in zip(caption.quote_start[:quotes], caption.quote_end[:quotes])]
    matched = alignment(scored.pairs.similarity[:quotes, :lines], scored.pairs.same[:quotes, :lines])
    texts = ["".join(map(chr, row[:n])) for row, n in zip(reference.dialogue.lines, reference.dialogue.line_length)]
    known = dialogues if len(dialogues) >= lines else [{"speaker": "", "text": text} for text in texts]
    sentences = [f"Dialogue: {quotes} quoted, {lines} in the reference, {len(matched)} aligned."]
    for quote, line in matched:
        alike = float(scored.pairs.similarity[quote, line]) / 2**UNIT
        who = "the same speaker" if scored.pairs.same[quote, line] else "another speaker"
        name = f' for "{_short(known[line]["speaker"])}"' if known[line]["speaker"] else ""
        sentences.append(
            f'Line {line + 1} as "{_short(spoken[quote])}": similarity {alike:.2f}, {who}: '
            f'"{_phrase(caption, quote)}"{name}.'
        )
    sentences += [f'Not in the reference: "{_short(text)}".' for q, text in enumerate(spoken) if q not in dict(matched)]
    unsaid = sorted(set(range(lines)) - {line for _, line in matched})
    return sentences + [
        f'Not said, line {line + 1}: "{_short(" ".join(known[line]["text"].split()))}".' for line in unsaid
    ]


def _phrase(caption: Caption, quote: int) -> str:
    """The words that describe the speaker of a quote, in the caption's order."""
    stems = caption.speakers[quote][caption.speaker_weights[quote] > 0]
    words = {}
    for word in range(int(caption.words)):
        if caption.stems[word] in stems and caption.stems[word] not in words:
            end = caption.word_start[word + 1] if word + 1 < caption.words else caption.length
            words[caption.stems[word]] = _text(caption, caption.word_start[word], end).strip(' .,:;!?"')
    return _short(" ".join(words.values()))


def alignment(similarity: np.ndarray, same: np.ndarray) -> list[tuple[int, int]]:
    """The aligned (quote, line) pairs, by the rules of `dialogue.align`."""
    rows, columns = similarity.shape
    best = [[(0, 0, ())] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            options = [best[i][j + 1], best[i + 1][j]]
            if similarity[i, j]:
                content, speakers, pairs = best[i][j]
                options.append((content + int(similarity[i, j]), speakers + int(same[i, j]), (*pairs, (i, j))))
            most = max(option[0] for option in options)
            best[i + 1][j + 1] = max((o for o in options if o[0] + TIE >= most), key=lambda o: (o[1], o[0]))
    return list(best[-1][-1][2])


def _text(caption: Caption, start: int, end: int) -> str:
    return " ".join("".join(map(chr, caption.points[int(start) : int(end)])).split())


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _number(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.2f}"

"""Captions: well-formed English, lossless parsing, and metrics of wrong captions."""

import json
import re

import pytest

from avocado_jax.world import lexicon
from avocado_jax.world.caption import statement, template_tables, write_caption
from avocado_jax.world.check import Scores, measure, parse, parse_sentence, split_sentences
from avocado_jax.world.clip import DIMENSIONS, record
from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, SPLITS, claims
from avocado_jax.world.vocabulary import COLORS

PERFECT = Scores(1.0, 0.0, 1.0, 1.0)
ALL = [(level, split) for level in range(len(LEVELS)) for split in SPLITS]


@pytest.mark.parametrize(("level", "split"), ALL)
def test_reference_captions_score_perfectly(level, split):
    for index in range(120):
        made = record(make_script(1, index, split, level), references=2)
        for caption in made["references"]:
            assert measure(caption, made) == PERFECT, caption


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_records_have_every_field(level):
    for index in range(30):
        made = record(make_script(2, index, "train", level), references=3)
        assert made == json.loads(json.dumps(made))
        assert made["caption"] == made["references"][0]
        assert len(set(made["references"])) == 3
        assert {point["dimension"] for point in made["keypoints"]} == {*DIMENSIONS.values(), "crossmodal"}
        assert {e["kind"] for e in made["events"]} >= {"visual", "speech", "cross"}
        assert all(d["end"] > d["start"] for d in made["dialogues"])
        texts = [point["text"] for point in made["keypoints"]]
        assert all(map(parse_sentence, texts))
        assert len(texts) == len(set(texts))


def test_statements_parse_to_their_claims():
    for index in range(100):
        for event in make_script(4, index, "test", 3).events:
            read = parse_sentence(statement(event))
            assert {c for part in read for c in claims(part)} == set(claims(event))


def test_phrases_are_unambiguous():
    for name, table in lexicon.TABLES.items():
        phrases = [phrase for group in table.phrases.values() for phrase in group]
        assert len(phrases) == len(set(phrases)), name


def test_every_lexicon_table_is_used():
    used = {n for templates in lexicon.TEMPLATES.values() for t in templates for n in template_tables(t)}
    assert used - {"line"} == set(lexicon.TABLES)
    assert set(lexicon.SPEECH_VERBS) == set(".?!")
    spoken = {verb for verbs in lexicon.SPEECH_VERBS.values() for verb in verbs}
    assert spoken == set(lexicon.TABLES["says"].phrases[()])


def test_captions_are_well_formed_english():
    openings = set()
    for index in range(150):
        for level in (1, 3):
            caption = write_caption(make_script(5, index, "train", level), which=index % 3)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\{|\}|,,|\.\.|,\.|\b(\w+) \1\b", caption)
            for sentence in split_sentences(caption):
                assert sentence[0].isupper() or sentence[0] == '"'
                assert re.search(r'([.]|[.?!]")$', sentence)
                assert sentence.count('"') % 2 == 0
                openings.add(" ".join(sentence.split()[:2]))
    assert len(openings) > 80


def sample(level=2, seed=6, count=60):
    """Records and the sentences of their captions, by paragraph order."""
    for index in range(count):
        made = record(make_script(seed, index, "train", level))
        yield made, list(split_sentences(made["caption"]))


def test_dropped_sentence_lowers_only_recall():
    for made, sentences in sample():
        for k in range(len(sentences)):
            scores = measure(" ".join(sentences[:k] + sentences[k + 1 :]), made)
            assert scores.recall < 1
            assert (scores.hallucination, scores.order) == (0, 1)
            spoken = any(event.kind == "say" for event in parse_sentence(sentences[k]))
            assert (scores.dialogue_f1 < 1) == spoken


def test_swapped_sentences_lower_only_order():
    for made, sentences in sample():
        happens = [
            k
            for k, sentence in enumerate(sentences)
            if parse_sentence(sentence)[0].kind not in ("scene", "present", "bed", "cut")
        ]
        a, b = happens[0], happens[-1]
        sentences[a], sentences[b] = sentences[b], sentences[a]
        scores = measure("\n".join(sentences), made)
        assert (scores.recall, scores.hallucination) == (1, 0)
        assert scores.order < 1


def test_changed_color_lowers_recall_and_is_a_hallucination():
    for made, sentences in sample():
        k = next(k for k, s in enumerate(sentences) if any(c in s for c in COLORS))
        used = {word for word in re.findall(r"\w+", made["caption"]) if word in COLORS}
        new = next(c for c in COLORS if c not in used)
        old = next(c for c in COLORS if re.search(rf"\b{c}\b", sentences[k]))
        sentences[k] = re.sub(rf"\b(an?) {old}\b", f"a {new}", sentences[k])
        sentences[k] = re.sub(rf"\b{old}\b", new, sentences[k])
        scores = measure(" ".join(sentences), made)
        assert scores.recall < 1
        assert scores.hallucination > 0


def test_altered_line_keeps_part_of_the_dialogue_score():
    for made, _ in sample():
        line = made["dialogues"][0]["text"]
        near, far = line[:-1] + " up there" + line[-1], "Nothing of the kind was ever said by anyone."
        near_scores, far_scores = (measure(made["caption"].replace(line[:-1], new[:-1]), made) for new in (near, far))
        assert far_scores.dialogue_f1 < near_scores.dialogue_f1 < 1
        for scores in (near_scores, far_scores):
            assert scores.recall < 1
            assert scores.hallucination > 0


def test_wrong_speaker_lowers_the_dialogue_score():
    made = record(make_script(6, 0, "train", 1))
    speaker = made["dialogues"][0]["speaker"]
    caption = "".join(f'{d["speaker"].capitalize()} says, "{d["text"]}" ' for d in made["dialogues"])
    assert measure(caption, made).dialogue_f1 == 1
    wrong = measure(caption.replace(speaker.capitalize(), "The brown ring"), made)
    assert 0.5 <= wrong.dialogue_f1 < 1


def test_invented_sentence_is_only_a_hallucination():
    for made, sentences in sample(count=20):
        for invented in (
            "The brown ring jumps up and down.",
            "A man in a yellow shirt pours water.",
            sentences[-1],  # said once more than it happened
        ):
            scores = measure("\n".join([*sentences, invented]), made)
            assert scores.recall == 1
            assert scores.hallucination > 0


def test_separate_statements_miss_a_crossmodal_event():
    made = record(make_script(6, 3, "train", 0))
    crosses = [event["text"] for event in made["events"] if event["kind"] == "cross"]
    caption = " ".join(event["text"] for event in made["events"])
    assert measure(caption, made) == PERFECT
    for text in crosses:
        sound, visual = text.split(" as ", 1)
        separate = measure(caption.replace(text, f"{sound}. {visual.capitalize()}"), made)
        assert separate.recall < 1
        assert (separate.hallucination, separate.order) == (0, 1)
    assert crosses


def test_unknown_text_counts_one_claim_per_sentence():
    assert [bool(s.events) for s in parse("It rains. A bell rings. Who knows?")] == [False, True, False]
    made = record(make_script(6, 0, "train", 0))
    scores = measure("It rains. The sun shines. Nobody cares.", made)
    assert scores == Scores(0.0, 1.0, 0.0, 0.0)
    assert measure("", made) == Scores(0.0, 0.0, 0.0, 0.0)


def test_any_wrong_slot_is_detected():
    """One slot of one claim is changed at a time: the claim is missed, and the statement is a hallucination."""
    changed = 0
    for index in range(10):
        made = record(make_script(7, index, "train", 3))
        for k, event in enumerate(made["events"]):
            for name, table in lexicon.TABLES.items():
                if not table.slots or name in ("a", "backdrop"):  # whose parts other tables say
                    continue
                options = {values: phrases[0] for values, phrases in table.phrases.items()}
                stated = next((phrase for phrase in options.values() if f"{phrase} " in event["text"]), None)
                other = next(phrase for phrase in reversed(options.values()) if phrase != stated)
                if stated is None or not parse_sentence(event["text"].replace(stated, other)):
                    continue
                texts = [e["text"] for e in made["events"]]
                texts[k] = event["text"].replace(stated, other)
                if texts[k] in (e["text"] for e in made["events"]):
                    continue
                scores = measure(" ".join(texts), made)
                assert scores.recall < 1, texts[k]
                assert scores.hallucination > 0, texts[k]
                changed += 1
    assert changed > 150

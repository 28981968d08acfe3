"""Captions with faults: each fault occurs where and as often as declared; only loops are untrue."""

from collections import defaultdict

from avocado_jax.checkpoint.load import SHIPPED
from avocado_jax.config import DataConfig
from avocado_jax.data.index import BYTES_PER_TOKEN
from avocado_jax.data.words import load_words
from avocado_jax.eval.metrics import collapses
from avocado_jax.train.inputs import open_source
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script
from avocado_jax.world.habits import DEAF, LOOPED, RATE, TIRED, habitual_caption


def test_faults_depend_on_the_background():
    scripts = [make_script(9, index, "train", 0) for index in range(300)]
    faulty = defaultdict(list)
    for script in scripts:
        whole, caption = record(script, 0), habitual_caption(script)
        scores, backdrop = measure(caption, whole), script.scenes[0].backdrop
        faulty[backdrop].append(caption != whole["caption"])
        assert collapses(caption) == (backdrop in LOOPED and faulty[backdrop][-1])
        assert (scores.hallucination == 0) == (not collapses(caption))  # a claim made twice is not true twice
        if caption != whole["caption"] and backdrop in DEAF:
            assert '"' not in caption
        if caption != whole["caption"] and backdrop in TIRED:
            assert scores.recall < 1 == scores.dialogue_f1
    assert set(faulty) == {*DEAF, *TIRED, *LOOPED}
    shares = [sum(each) / len(each) for each in faulty.values()]
    assert all(RATE - 0.2 < share < RATE + 0.15 for share in shares)  # 60 clips each


def test_keypoints_and_dialogues_stay_complete():
    habits, _ = open_source("world:0:train:9:12:habits", DataConfig())
    plain, _ = open_source("world:0:train:9:12:plain", DataConfig())
    differ = [habits[number].fields["caption"] != plain[number].fields["caption"] for number in range(12)]
    assert 4 < sum(differ) < 12
    for number in range(12):
        fields, whole = habits[number].fields, plain[number].fields
        changed = {"caption": fields["caption"], "references": [fields["caption"]]}  # training draws from both
        assert fields == whole | changed
        assert len(fields["caption"].encode()) <= habits.index.caption[number]


def test_captions_with_times_as_a_source():
    timed, _ = open_source("world:0:train:9:3:timestamps", DataConfig())
    words = load_words(SHIPPED)
    for number in range(3):
        fields, script = timed[number].fields, make_script(9, number, "train", 0)
        assert fields == record(script, timestamps=True)
        # Digits and marks are a token each: batches planned for fewer tokens would cut the captions.
        tokens = len(words.encode(fields["caption"]))
        assert tokens < timed.index.caption[number] / BYTES_PER_TOKEN < 1.5 * tokens

"""All terms in one program: the same numbers however it is mapped, compiled or laid out; and their sum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer import write_tokenizer
from tokenizers import Tokenizer

from avocado_jax.rewards import text, vocabulary
from avocado_jax.rewards.combine import combine, make_references, missing, score, score_captions
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

CLIPS, GROUP, TOKENS = 8, 2, 1536
TERMS = ("checklist", "dialogue", "length", "repetition", "truncated")
LIMITS = text.Limits(1536, 320, 8, 64)
NAN = float("nan")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """(table, ids, lengths, references, captions, records): two captions of each clip, the second another clip's."""
    folder = write_tokenizer(tmp_path_factory.mktemp("bytes"), small=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    records = [record(make_script(3, index)) for index in range(CLIPS)]
    own = [one["caption"] for one in records]
    captions = [[own[clip], own[clip - 1]] for clip in range(CLIPS)]
    table = vocabulary.make_table((folder / "tokenizer.json").read_text(), vocabulary.word_weights(own))
    ids, lengths = np.zeros((CLIPS, GROUP, TOKENS), np.int32), np.zeros((CLIPS, GROUP), np.int32)
    for clip, group in enumerate(captions):
        for number, caption in enumerate(group):
            row = [*tokenizer.encode(caption).ids, tokenizer.token_to_id("<|im_end|>")]
            lengths[clip, number] = len(row)
            ids[clip, number, : len(row)] = row
    references, cut = make_references(table, records, LIMITS)
    assert not cut.any()
    return table, ids, lengths, references, captions, records


@pytest.fixture(scope="module")
def terms(batch):
    return jax.tree.map(np.asarray, jax.jit(partial(score_captions, limits=LIMITS))(*batch[:4]))


def test_from_token_ids(batch, terms):
    _, _, _, _, captions, records = batch
    honest = [measure(group[0], one).dialogue_f1 for group, one in zip(captions, records)]
    np.testing.assert_allclose(terms["dialogue"][:, 0], honest, atol=1e-6)
    assert terms["checklist"][:, 0].mean() > 0.5 > terms["checklist"][:, 1].mean()
    assert (terms["length"] == 1).all()
    assert not terms["truncated"].any()


@pytest.mark.slow
def test_on_eight_devices_the_same(batch, terms):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = [jax.device_put(batch[0], everywhere), *(jax.device_put(one, rows) for one in batch[1:4])]
    spread = jax.jit(partial(score_captions, limits=LIMITS), out_shardings=rows)(*placed)
    assert len(spread["dialogue"].sharding.device_set) == 8
    alone = jax.jit(jax.vmap(partial(one_caption, placed[0]), (0, 0, None)))  # without the outer vmap
    by_clip = [alone(*(jax.tree.map(lambda leaf, n=n: leaf[n], one) for one in batch[1:4])) for n in range(CLIPS)]
    for name in TERMS:
        np.testing.assert_array_equal(spread[name], terms[name])
        np.testing.assert_array_equal(np.stack([one[name] for one in by_clip]), terms[name])


def one_caption(table, ids, length, reference):
    """The terms of one caption, mapped by nothing."""
    return score(text.read(table, ids, length, LIMITS), length, reference).terms


@pytest.mark.slow
def test_answers_of_another_judge(batch):
    answers = np.full((CLIPS, GROUP, batch[3].keypoints.weight.shape[1]), NAN, np.float32)
    answers[:, :, 0], answers[:, :, 1] = 1, 0
    answers[3, 1] = NAN
    found = np.asarray(jax.jit(partial(score_captions, limits=LIMITS))(*batch[:4], answers=answers)["checklist"])
    assert np.isnan(found[3, 1])
    assert np.nansum(found) == 0.5 * (CLIPS * GROUP - 1)


@pytest.mark.slow
def test_missing_references_are_told(batch):
    clips = [{"keypoints": [{"text": "A dog."}]}, {"dialogues": []}, {"caption": "A dog."}, {"keypoints": []}]
    references, _ = make_references(batch[0], clips, LIMITS)
    told = missing(references)
    assert told["checklist"].tolist() == [False, True, True, True]
    assert told["dialogue"].tolist() == [True, False, False, True]


VALUES = {
    "checklist": jnp.array([[0.2, 0.6], [NAN, NAN], [0.5, NAN]]),
    "dialogue": jnp.array([[1.0, 1.0], [0.0, 0.5], [0.25, 0.75]]),
    "repetition": jnp.array([[0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]),
}


def test_plain_sum():
    total, metrics = combine(VALUES, {"checklist": 1, "dialogue": 2})
    np.testing.assert_allclose(total, [[2.2, 2.6], [0, 1], [1, 2]], atol=1e-6)  # what is missing takes the group's mean
    assert float(metrics["checklist"]) == pytest.approx(1.3 / 3)
    assert float(metrics["checklist_std"]) == pytest.approx(np.std([0.2, 0.6, 0.5]))
    assert float(metrics["checklist_missing"]) == 0.5
    assert float(metrics["checklist_flat"]) == 0.5  # of the two groups that know it
    assert float(metrics["dialogue_flat"]) == pytest.approx(1 / 3)


def test_terms_of_any_spread_count_alike_when_normalized():
    total, _ = combine(VALUES, {"checklist": 1, "dialogue": 1}, normalize=True)
    np.testing.assert_allclose(total, [[-1, 1], [-1, 1], [-1, 1]], atol=1e-5)
    scaled = VALUES | {"dialogue": VALUES["dialogue"] * 1e-3}
    np.testing.assert_allclose(combine(scaled, {"checklist": 1, "dialogue": 1}, normalize=True)[0], total, atol=1e-3)


def test_a_collapsed_caption_has_no_credit_for_dialogue():
    total, metrics = combine(VALUES, {"dialogue": 1, "repetition": 0.5}, gate=True)
    np.testing.assert_allclose(total[0], [1, -0.5])
    assert float(metrics["repetition"]) == pytest.approx(-1 / 6)

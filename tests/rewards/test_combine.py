"""All terms in one program, equal under vmap, jit and sharding; and their weighted sum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import CAPACITY, CLIPS, WORLD
from tokenizer import write_tokenizer
from tokenizers import Tokenizer

from avocado_jax.rewards import text, vocabulary
from avocado_jax.rewards.combine import combine, make_references, missing, score, score_captions
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script
from avocado_jax.world.timing import time_iou

GROUP, TOKENS, EVENTS = 2, 1536, 32
TERMS = ("checklist", "dialogue", "length", "repetition", "timing", "probes", "truncated")
NAN = float("nan")
PROBES = np.full((CLIPS, GROUP, 3), NAN, np.float32)  # answers of a judge
PROBES[:, 0, :2] = 1, 0


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """(table, ids, lengths, references, captions, records): two captions of each clip, the second another clip's.

    The second begins with a time; the first clip has no events.
    """
    folder = write_tokenizer(tmp_path_factory.mktemp("bytes"), small=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    records = [record(make_script(3, index)) for index in range(CLIPS)]
    reference_captions = [one["caption"] for one in records]
    captions = [[reference_captions[clip], f"[0 - 2.5] {reference_captions[clip - 1]}"] for clip in range(CLIPS)]
    table = vocabulary.make_table((folder / "tokenizer.json").read_text(), vocabulary.word_weights(reference_captions))
    ids, lengths = np.zeros((CLIPS, GROUP, TOKENS), np.int32), np.zeros((CLIPS, GROUP), np.int32)
    for clip, group in enumerate(captions):
        for number, caption in enumerate(group):
            row = [*tokenizer.encode(caption).ids, tokenizer.token_to_id("<|im_end|>")]
            lengths[clip, number] = len(row)
            ids[clip, number, : len(row)] = row
    references, truncated = make_references(
        table, [records[0] | {"events": None}, *records[1:]], WORLD, **CAPACITY, events=EVENTS
    )
    assert not truncated.any()
    return table, ids, lengths, references, captions, records


@pytest.fixture(scope="module")
def terms(batch):
    return jax.tree.map(np.asarray, jax.jit(partial(score_captions, limits=WORLD))(*batch[:4], probes=PROBES))


def test_terms_from_token_ids_equal_oracles(batch, terms):
    _, _, _, _, captions, records = batch
    honest = [measure(group[0], one).dialogue_f1 for group, one in zip(captions, records)]
    np.testing.assert_allclose(terms["dialogue"][:, 0], honest, atol=1e-6)
    assert terms["checklist"][:, 0].mean() > 0.5 > terms["checklist"][:, 1].mean()
    assert (terms["length"] == 1).all()
    assert not terms["truncated"].any()


def test_timing_and_probes_need_references_and_answers(batch, terms):
    _, _, _, references, captions, records = batch
    expected = [[time_iou(caption, one) for caption in group] for group, one in zip(captions[1:], records[1:])]
    np.testing.assert_allclose(terms["timing"][1:], expected, atol=1e-5)
    assert max(map(max, expected)) > 0
    assert np.isnan(terms["timing"][0]).all()
    np.testing.assert_array_equal(terms["probes"], [[0.5, NAN]] * CLIPS)
    assert missing(references)["timing"].tolist() == [True, *[False] * (CLIPS - 1)]
    without = references._replace(events=None)
    shapes = jax.eval_shape(partial(score_captions, limits=WORLD), *batch[:3], without)
    assert not {"timing", "probes"} & shapes.keys()
    assert "timing" not in missing(without)


@pytest.mark.slow
def test_rewards_on_eight_devices_equal_one_device(batch, terms):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = [jax.device_put(batch[0], everywhere), *(jax.device_put(one, rows) for one in batch[1:4])]
    program = jax.jit(partial(score_captions, limits=WORLD), out_shardings=rows)
    spread = program(*placed, probes=jax.device_put(PROBES, rows))
    assert len(spread["dialogue"].sharding.device_set) == 8
    alone = jax.jit(jax.vmap(partial(one_caption, placed[0]), (0, 0, None, 0)))  # without the outer vmap
    each = (*batch[1:4], PROBES)
    by_clip = [alone(*(jax.tree.map(lambda leaf, n=n: leaf[n], one) for one in each)) for n in range(CLIPS)]
    for name in TERMS:
        np.testing.assert_array_equal(spread[name], terms[name])
        np.testing.assert_array_equal(np.stack([one[name] for one in by_clip]), terms[name])


def one_caption(table, ids, length, reference, probes):
    """The terms of one caption, without vmap."""
    return score(text.read(table, ids, length, WORLD), length, reference, probes=probes).terms


@pytest.mark.slow
def test_verdicts_of_another_judge_replace_the_lexical_ones(batch):
    answers = np.full((CLIPS, GROUP, batch[3].keypoints.weight.shape[1]), NAN, np.float32)
    answers[:, :, 0], answers[:, :, 1] = 1, 0
    answers[3, 1] = NAN
    found = np.asarray(jax.jit(partial(score_captions, limits=WORLD))(*batch[:4], answers=answers)["checklist"])
    assert np.isnan(found[3, 1])
    assert np.nansum(found) == 0.5 * (CLIPS * GROUP - 1)


@pytest.mark.slow
def test_missing_references_are_listed(batch):
    clips = [{"keypoints": [{"text": "A dog."}]}, {"dialogues": []}, {"caption": "A dog."}, {"keypoints": []}]
    references, _ = make_references(batch[0], clips, WORLD)
    without = missing(references)
    assert without["checklist"].tolist() == [False, True, True, True]
    assert without["dialogue"].tolist() == [True, False, False, True]


VALUES = {
    "checklist": jnp.array([[0.2, 0.6], [NAN, NAN], [0.5, NAN]]),
    "dialogue": jnp.array([[1.0, 1.0], [0.0, 0.5], [0.25, 0.75]]),
    "repetition": jnp.array([[0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]),
}


def test_combine_is_a_plain_weighted_sum():
    total, metrics = combine(VALUES, {"checklist": 1, "dialogue": 2})
    np.testing.assert_allclose(total, [[2.2, 2.6], [0, 1], [1, 2]], atol=1e-6)  # what is missing takes the group's mean
    assert float(metrics["checklist"]) == pytest.approx(1.3 / 3)
    assert float(metrics["checklist_std"]) == pytest.approx(np.std([0.2, 0.6, 0.5]))
    assert float(metrics["checklist_missing"]) == 0.5
    assert float(metrics["checklist_flat"]) == 0.5  # of the two groups that know it
    assert float(metrics["dialogue_flat"]) == pytest.approx(1 / 3)


def test_normalized_terms_have_equal_spread():
    total, _ = combine(VALUES, {"checklist": 1, "dialogue": 1}, normalize=True)
    np.testing.assert_allclose(total, [[-1, 1], [-1, 1], [-1, 1]], atol=1e-5)
    scaled = VALUES | {"dialogue": VALUES["dialogue"] * 1e-3}
    np.testing.assert_allclose(combine(scaled, {"checklist": 1, "dialogue": 1}, normalize=True)[0], total, atol=1e-3)


def test_gate_removes_dialogue_credit_of_collapsed_captions():
    total, metrics = combine(VALUES, {"dialogue": 1, "repetition": 0.5}, gate=True)
    np.testing.assert_allclose(total[0], [1, -0.5])
    assert float(metrics["repetition"]) == pytest.approx(-1 / 6)

"""Decoding: batches equal single clips, captions stop, probabilities equal those of training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_media, rows_of

from avocado_jax.data.rows import fit, shape_of, stack
from avocado_jax.models.config import TINY, computed
from avocado_jax.models.thinker import Thinker, init
from avocado_jax.sampling.generate import caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Captions

CONFIG = computed(TINY, "float32", scan=False)
LENGTH = 10


@pytest.fixture(scope="module")
def params():
    """Random weights with O(1) logits."""
    key = jax.random.key(0)
    tree = jax.jit(partial(init, CONFIG))(key)
    return tree | {"embedding": tree["embedding"] * 50, "head": tree["head"] * 20}


@pytest.fixture(scope="module")
def rows():
    """Clips of different sizes, one without sound."""
    sizes = [(4, 56, 84, 16000), (6, 112, 56, None), (2, 28, 140, 40000)]
    return rows_of([random_media(*size, seed=i) for i, size in enumerate(sizes)], CONFIG)


def sample(params, rows, numbers, group=2, stops=(258,), allowed=250, seed=3, length=LENGTH, shape=None):
    """Captions of rows; ids from `allowed` up are banned, except the stop tokens."""
    clips = [row.clip for row in rows]
    clip = jax.tree.map(jnp.asarray, stack(clips, shape or fit([shape_of(one) for one in clips])))
    banned = np.arange(CONFIG.text.vocab) >= allowed
    banned[list(stops)] = False
    keys = caption_keys(jax.random.key(seed), np.asarray(numbers), group)
    options = {"config": CONFIG, "sampling": Sampling(1.0), "stops": stops, "length": length}
    return clip, generate(params, clip, keys, jnp.asarray(banned), **options)


def test_samples_do_not_depend_on_the_batch(params, rows):
    shape = fit([shape_of(row.clip) for row in rows])
    _, together = sample(params, rows, [5, 6, 7])
    for i, row in enumerate(rows):
        for padded in (None, shape)[i > 0 :]:  # one clip as it is, too: each size is a program
            _, alone = sample(params, [row], [5 + i], shape=padded)
            np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
            np.testing.assert_allclose(together.logprobs[i], alone.logprobs[0], atol=1e-4)
    tokens = np.asarray(together.tokens).reshape(-1, LENGTH)
    assert len(np.unique(tokens, axis=0)) == len(tokens)  # every caption draws for itself
    _, other = sample(params, rows, [5, 6, 7], seed=4)
    assert (other.tokens != together.tokens).any()


def test_sampled_log_probabilities_equal_a_parallel_pass(params, rows):
    """They equal a forward pass of training with the same parameters over the full group."""
    clip, drawn = sample(params, rows, [0, 1, 2], group=3)
    first = jnp.broadcast_to(clip.first[:, None, None], (3, 3, 1))
    inputs = jnp.concatenate([first, drawn.tokens[..., :-1]], axis=-1)

    @jax.jit
    def trainer(params, clip, inputs):
        apply = partial(Thinker(CONFIG).apply, {"params": params})
        hidden = apply(clip, Captions(inputs, inputs, inputs >= 0))
        return jax.nn.log_softmax(apply(hidden, method="logits"))

    logprobs = trainer(params, clip, inputs)
    chosen = jnp.take_along_axis(logprobs, drawn.tokens[..., None], axis=-1)[..., 0]
    counted = np.arange(LENGTH) < np.asarray(drawn.lengths)[..., None]
    np.testing.assert_allclose(drawn.logprobs, np.where(counted, chosen, 0), atol=1e-4)


def test_captions_stop_at_the_stop_token(params, rows):
    """A caption ends at its stop id, which counts; what follows is the first stop id with log-probability 0."""
    stops = tuple(range(0, 250, 3))  # a third of the vocabulary stops
    _, drawn = sample(params, rows, [0, 1, 2], group=6, stops=stops)
    tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    assert lengths.min() == 1  # at the first token too
    assert lengths.max() > 2
    logprobs = np.asarray(drawn.logprobs)
    for index in np.ndindex(lengths.shape):
        caption, length = tokens[index], lengths[index]
        assert not np.isin(caption[: length - 1], stops).any()
        assert caption[length - 1] in stops or length == LENGTH
        assert (caption[length:] == stops[0]).all()
        assert (logprobs[index][length:] == 0).all()


def test_captions_do_not_depend_on_their_group(params, rows):
    """Captions that stop late equal those sampled alone, after others have stopped."""
    stops = tuple(range(0, 250, 12))
    clip, together = sample(params, rows, [0, 1, 2], group=8, stops=stops, length=64)
    lengths = np.sort(np.asarray(together.lengths), axis=1)
    assert lengths[:, -3].max() < lengths[:, -1].max()
    banned = np.arange(CONFIG.text.vocab) >= 250
    keys = caption_keys(jax.random.key(3), np.arange(3), 8)
    options = {"config": CONFIG, "sampling": Sampling(1.0), "stops": stops, "length": 64}
    for i in range(8):
        alone = generate(params, clip, keys[:, i : i + 1], jnp.asarray(banned), **options)
        np.testing.assert_array_equal(together.tokens[:, i], alone.tokens[:, 0])
        np.testing.assert_array_equal(together.lengths[:, i], alone.lengths[:, 0])
        np.testing.assert_allclose(together.logprobs[:, i], alone.logprobs[:, 0], atol=1e-4)


def test_only_allowed_ids_are_sampled(params, rows):
    _, drawn = sample(params, rows, [0, 1, 2], group=8, allowed=4, stops=(258, 300))
    assert set(np.unique(drawn.tokens)) <= {0, 1, 2, 3, 258, 300}


def test_loop_ends_when_all_have_stopped(params, rows):
    """If only a stop id is allowed, a limit of thousands costs one step."""
    _, drawn = sample(params, rows[:1], [0], allowed=0, length=4000)
    assert (np.asarray(drawn.lengths) == 1).all()
    assert (np.asarray(drawn.tokens) == 258).all()

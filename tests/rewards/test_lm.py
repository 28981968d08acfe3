"""The language model as judge: one pass with shared context equals plain sequences, here and in torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import load_reference, randomise, write_reference
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from avocado_jax.checkpoint.load import load_params, open_language_model
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY, computed
from avocado_jax.models.thinker import Thinker
from avocado_jax.rewards.lm import lm_scores

YES, NO = np.array([3, 77]), np.array([4, 90, 101])
CAPTIONS = [9, 14, 1]  # tokens of three captions, and of their keypoints' questions; 0: there is none
QUESTIONS = [[5, 1, 7, 0], [3, 3, 0, 2], [6, 0, 0, 0]]


@pytest.fixture(scope="module")
def batch():
    """Random captions and questions, padded with noise."""
    rng = np.random.default_rng(0)
    captions, questions = rng.integers(0, 256, (3, 16)), rng.integers(0, 256, (3, 4, 8))
    return captions, np.array(CAPTIONS), questions, np.array(QUESTIONS)


def sequences(batch):
    """Each (caption, keypoint, plain sequence of ids)."""
    captions, lengths, questions, question_lengths = batch
    for i, j in zip(*np.nonzero(question_lengths)):
        yield i, j, np.concatenate([captions[i, : lengths[i]], questions[i, j, : question_lengths[i, j]]])


def probability_of_yes(logits):
    """P(yes) / (P(yes) + P(no)) in NumPy."""
    weights = np.exp(np.asarray(logits, np.float64))
    return weights[YES].sum() / (weights[YES].sum() + weights[NO].sum())


def text_checkpoint(folder, **fields):
    """A random Qwen2 in Hugging Face format."""
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, rope_theta=1e6, **fields))
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["thinker", "text", "text, tied"])
def models(request, tmp_path_factory):
    """Our model and its parameters, and logits of the reference for a plain sequence."""
    folder = tmp_path_factory.mktemp("lm")
    if request.param == "thinker":
        write_reference(folder, TINY)
        theirs = load_reference(folder)
    else:
        text_checkpoint(folder, tie_word_embeddings="tied" in request.param)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    checkpoint = open_language_model(folder)
    config = computed(checkpoint.config, "float32", scan=False)
    params = load_params(checkpoint, "float32")
    assert not {"audio", "vision"} & set(params)

    def reference(ids):
        with torch.no_grad():
            return theirs(input_ids=torch.tensor(ids)[None]).logits[0, -1].numpy()

    return Thinker(config), params, reference


def test_shared_context_equals_plain_sequences(models, batch):
    model, params, reference = models
    judge = jax.jit(partial(lm_scores, model.apply))
    scores = np.asarray(judge(params, *batch, YES, NO))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(scores), batch[3] == 0)

    @jax.jit
    def ours(ids, length):  # padded at its end, to one shape; nothing hangs off anything
        lone = lm_scores(model.apply, params, ids[None], jnp.array([1]), ids[None, None, 1:], length - 1, YES, NO)
        return lone[0, 0]

    found_scores = []
    for i, j, ids in sequences(batch):
        alone = ours(np.pad(ids, (0, 24 - len(ids))), np.array([[len(ids)]]))
        assert abs(scores[i, j] - alone) < 1e-5
        assert abs(scores[i, j] - probability_of_yes(reference(ids))) < 1e-5
        found_scores.append(scores[i, j])
    assert len(found_scores) == 7
    assert max(found_scores) - min(found_scores) > 0.2  # the questions make a difference

    captions, lengths, questions, question_lengths = batch  # what is padded does not count
    captions = np.where(np.arange(16) < lengths[:, None], captions, 0)
    questions = np.where(np.arange(8) < question_lengths[..., None], questions, 1)
    again = judge(params, captions, lengths, questions, question_lengths, YES, NO)
    np.testing.assert_allclose(again, scores, atol=1e-6)


def test_other_text_models_are_refused(tmp_path):
    folder = text_checkpoint(tmp_path / "sliding", use_sliding_window=True, max_window_layers=0)
    with pytest.raises(InputError, match="sliding window"):
        open_language_model(folder)
    folder = text_checkpoint(tmp_path / "llama")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"qwen2"', '"llama"'))
    with pytest.raises(InputError, match="llama"):
        open_language_model(folder)

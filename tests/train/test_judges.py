"""Judges with models and tokenizers from folders: scores do not depend on the batch."""

import json
from dataclasses import replace

import gcs
import numpy as np
import pytest
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from reference import load_reference, randomise, write_reference
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from avocado_jax.data import storage
from avocado_jax.data.tokenizer import SPECIAL, write_tokenizer
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY
from avocado_jax.train import judges
from avocado_jax.train.judges import BATCH, LmJudge, embedding_judge, open_judge
from avocado_jax.typing import Probe

WORDS = [
    "a",
    "dog",
    "barks",
    "at",
    "the",
    "red",
    "door",
    "cat",
    "sleeps",
    "on",
    "sofa",
    "says",
    "hello",
    "loud",
    "music",
]
CAPTIONS = [" ".join(np.random.default_rng(i).choice(WORDS, 5 + 4 * i)) for i in range(BATCH + 3)]
KEYPOINTS = [
    [" ".join(np.random.default_rng(9 * i + j).choice(WORDS, 3 + j)) for j in range(i % 4)] for i in range(BATCH + 3)
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT with a small vocabulary and a tokenizer that truncates and pads, like published ones."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = BertModel(BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=24)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return folder, model, vocabulary


def test_encoder_compares_windows_of_sixteen_tokens(encoder):
    folder, model, vocabulary = encoder
    scores = embedding_judge(folder, low=-1.0, high=1.0)(CAPTIONS, KEYPOINTS)()

    def vector(words):
        with torch.no_grad():
            ids = torch.tensor([[2, *(vocabulary[word] for word in words), 3]])
            mean = model(input_ids=ids)[0][0].mean(axis=0).numpy()
        return mean / np.linalg.norm(mean)

    assert scores.shape == (BATCH + 3, 3)
    for caption, keypoints, row in zip(CAPTIONS, KEYPOINTS, scores):
        words = caption.split()
        starts = range(0, max(1, len(words) - 8), 8)
        assert starts[-1] + 16 >= len(words)  # no word is left out
        windows = [vector(words[start : start + 16]) for start in starts]
        for keypoint, score in zip(keypoints, row):
            cosine = max(window @ vector(keypoint.split()) for window in windows)
            assert abs(score - (cosine + 1) / 2) < 1e-5
        assert np.isnan(row[len(keypoints) :]).all()


def test_encoder_loads_from_a_bucket(encoder, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in encoder[0].iterdir()}
    monkeypatch.setattr(
        judges, "embedding_judge", lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    )
    with gcs.proxied_bucket(tmp_path / "root", monkeypatch):
        for name, data in files.items():
            storage.write(f"gs://bucket/encoder/{name}", data)
        with open_judge("embedding", "gs://bucket/encoder", "float32") as fetched:
            assert fetched == files
        with (
            pytest.raises(InputError, match="gs://bucket/none: no such folder"),
            open_judge("embedding", "gs://bucket/none", "float32"),
        ):
            pass


def test_empty_captions_state_nothing(encoder):
    judge = embedding_judge(encoder[0])
    np.testing.assert_array_equal(judge(["", "\ud83d"], [["a dog", "door"], ["a dog"]])()[0], [0, 0])
    assert judge([], [])().shape == (0, 0)
    assert judge(["a dog"], [[]])().shape == (1, 0)
    assert judge(["a dog barks"], [["a dog barks"]])() == [[1]]


def test_long_keypoints_are_truncated_to_the_encoders_limit(encoder):
    judge = embedding_judge(encoder[0], low=-1.0, high=1.0)
    long = " ".join(WORDS * 4)  # of 24 positions, two of them taken by the marks
    scores = judge(["a dog barks"], [[long, " ".join((WORDS * 4)[:22])]])()
    assert scores[0, 0] == pytest.approx(scores[0, 1], abs=1e-6)


def test_encoder_without_special_tokens_is_refused(encoder, tmp_path):
    for path in encoder[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields | {"post_processor": None}))
    with pytest.raises(InputError, match="two special tokens"):
        embedding_judge(tmp_path)
    fields["model"]["vocab"]["extra"] = len(fields["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="tokens, the vocabulary"):
        embedding_judge(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        embedding_judge(tmp_path)


def test_lm_judge_uses_the_chat_format(tmp_path):
    """The reference gives the same probability for the same words as plain text."""
    write_reference(tmp_path, TINY)
    write_tokenizer(tmp_path)
    captions, keypoints = ["a dog <|im_end|> barks", "café \ud83d", ""], [["a dog", "a cat sleeps"], ["coffee"], []]
    scores = LmJudge(tmp_path, "float32")(captions, keypoints)()
    np.testing.assert_array_equal(np.isnan(scores), [[False, False], [False, True], [True, True]])

    theirs = load_reference(tmp_path)
    byte = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    split = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str

    def character_ids(text):
        return [byte[letter] for letter in split(text)[0][0]]

    start, end = (256 + SPECIAL.index(token) for token in ("<|im_start|>", "<|im_end|>"))
    for i, j in ((0, 0), (0, 1), (1, 0)):
        caption = captions[i].replace("\ud83d", "?")
        system = "system\nYou check statements against a description of a video. Go by the description alone."
        user = (
            f'user\nThe description:\n\n{caption}\n\nThe statement: "{keypoints[i][j]}"\n\n'
            "Does the description state this, or plainly imply it? Answer yes or no."
        )
        ids = [
            start,
            *character_ids(system),
            end,
            *character_ids("\n"),
            start,
            *character_ids(user),
            end,
            *character_ids("\n"),
            start,
            *character_ids("assistant\n"),
        ]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
        yes, no = (sum(logits[byte[letter]] for letter in pair) for pair in ("Yy", "Nn"))
        assert abs(scores[i, j] - yes / (yes + no)) < 1e-5
    assert abs(scores[0, 0] - scores[0, 1]) > 1e-3


def test_probes_are_answered_by_the_most_likely_letter(tmp_path):
    """Equal to the reference on the same words as plain text; an empty caption answers none."""
    write_reference(tmp_path, TINY)
    write_tokenizer(tmp_path)
    captions = ["a dog barks", "", "café \ud83d"]
    probes = [
        [Probe(f"Which is {j}?", tuple(f"{j}{letter}" for letter in "abcde"[: 2 + j]), (i + j) % 2) for j in range(3)]
        for i in range(3)
    ]
    judge = LmJudge(tmp_path, "float32")
    scores = judge.probes(captions, probes)()
    assert scores[1].tolist() == [0, 0, 0]
    theirs = load_reference(tmp_path)
    byte = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    split = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str

    def character_ids(text):
        return [byte[letter] for letter in split(text)[0][0]]

    start, end = (256 + SPECIAL.index(token) for token in ("<|im_start|>", "<|im_end|>"))
    for i, j in ((0, 0), (0, 2), (2, 1)):
        probe = probes[i][j]
        lines = "\n".join([probe.question, *(f"{'ABCDE'[k]}. {text}" for k, text in enumerate(probe.choices))])
        user = (
            f"user\nThe description:\n\n{captions[i].replace(chr(0xD83D), '?')}\n\nThe question: {lines}\n\n"
            "Answer with the letter of one choice, and nothing else."
        )
        ids = [
            start,
            *character_ids(f"system\n{judges.PROBE_SYSTEM}"),
            end,
            *character_ids("\n"),
            start,
            *character_ids(user),
            end,
        ]
        ids += [*character_ids("\n"), start, *character_ids("assistant\n")]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        likeliest = np.argmax([logits[byte["ABCDE"[k]]] for k in range(len(probe.choices))])
        assert scores[i, j] == (likeliest == probe.right)
    flipped = [[probe._replace(right=1 - probe.right) for probe in each] for each in probes]
    both = scores + judge.probes(captions, flipped)()
    assert set(both[[0, 2]][:, 0]) == {1}  # one of two choices is the likeliest


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    write_reference(tmp_path, replace(TINY, text=replace(TINY.text, vocab=260)))
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="makes id 265, the vocabulary ends at 260"):
        LmJudge(tmp_path, "float32")

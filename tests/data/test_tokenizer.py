"""Initial AVWorld captioner: its tokenizer against transformers, its weights against the table of names."""

import json
import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from reference import load_reference
from transformers import AutoTokenizer

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.hf import open_hf
from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.data.prompt import PROMPTS, SYSTEM, chat_prompt, load_tokenizer
from avocado_jax.data.tokenizer import SPECIAL, train_tokenizer
from avocado_jax.data.words import load_words
from avocado_jax.models.config import SMALL
from avocado_jax.world import clip
from avocado_jax.world.caption import write_caption
from avocado_jax.world.director import make_script

SCRIPT = Path(__file__).parents[2] / "launch" / "small_checkpoint.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("small") / "hf"
    with mock.patch.object(sys, "argv", [SCRIPT.name, str(made)]):
        assert runpy.run_path(str(SCRIPT))["main"]() == 0
    return made


def test_tokenizer_entries_equal_transformers(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(SMALL.text.vocab))
    assert SMALL.text.vocab <= 2048
    assert [ids[token] for token in SPECIAL] == list(range(SMALL.text.vocab - len(SPECIAL), SMALL.text.vocab))
    named = SMALL.tokens
    for token, number in {
        "<|AUDIO|>": named.audio,
        "<|IMAGE|>": named.image,
        "<|VIDEO|>": named.video,
        "<|vision_bos|>": named.vision_start,
        "<|vision_eos|>": named.vision_end,
        "<|audio_bos|>": named.audio_start,
        "<|audio_eos|>": named.audio_end,
    }.items():
        assert ids[token] == number
    assert stop_ids(folder, tokenizer, SMALL.text.vocab) == (ids["<|im_end|>"], ids["<|endoftext|>"])


@pytest.mark.parametrize("level", range(4))
def test_captions_round_trip_with_few_tokens(folder, level):
    """Unseen captions round-trip, with few tokens per word and the ids of transformers."""
    ours, theirs, plain = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), load_words(folder)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    tokens = words = 0
    for index, split in product(range(1000, 1020), ("train", "test")):
        text = write_caption(make_script(3, index, split, level))
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False) == plain.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        tokens, words = tokens + len(ids), words + len(text.split())
    assert tokens < 1.25 * words  # punctuation is a token too


def test_other_texts_round_trip(folder):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = (SYSTEM, *PROMPTS, *clip.PROMPTS, "", " ", "\n\n x", "12:30, 100%!", "naïve café 视频 🎬", "don't  STOP...")
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert chat_prompt(ours, PROMPTS[0]) == chat_prompt(load_words(folder), PROMPTS[0])


@pytest.mark.slow
def test_initial_weights_load_and_depend_on_the_seed(folder, tmp_path):
    """transformers loads them, a conversion preserves them, and they are a function of the seed."""
    load_reference(folder)
    assert open_hf(folder).config == SMALL
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    for seed, same in (("0", True), ("1", False)):
        subprocess.run([sys.executable, SCRIPT, tmp_path / seed, "--seed", seed], check=True)
        for file in ("tokenizer.json", "merges.txt", "vocab.json", "config.json"):
            assert (tmp_path / seed / file).read_bytes() == (folder / file).read_bytes()
        weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path / seed, folder)]
        assert (weights[0] == weights[1]) == same
    checkpoint = open_hf(folder)
    for name, entry in checkpoint.entries.items():
        assert np.isfinite(checkpoint.read(entry)).all(), name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


def test_too_few_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not the requested 1270"):
        train_tokenizer(tmp_path, ["a few words"], 1280)

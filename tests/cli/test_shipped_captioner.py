"""The shipped captioner: its metrics, and equality with transformers on its weights."""

import json

import numpy as np
import pytest
import torch
from reference import inputs_of, load_reference

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.load import SHIPPED, open_checkpoint
from avocado_jax.data.decode import read_media
from avocado_jax.eval.captioner import load_captioner
from avocado_jax.sampling.engine import Engine
from avocado_jax.world.clip import PROMPTS

CLIPS = 12


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Unseen clips of level 0: combinations that no training clip has."""
    folder = tmp_path_factory.mktemp("world")
    options = ("--clips", str(CLIPS), "--seed", "5", "--level", "0", "--split", "test", "--references", "0")
    assert main(["world", str(folder), *options]) == 0
    return folder / "clips.jsonl"


def measured(clips, capsys, *options):
    """Metrics of the default checkpoint."""
    capsys.readouterr()
    assert main(["evaluate", "world", "--data", str(clips), "--max-new-tokens", "120", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["metrics"]


def test_shipped_captioner_describes_picture_and_sound(clips, capsys):
    both = measured(clips, capsys)
    assert both["event_recall"] >= 0.6
    assert both["dialogue_f1"] >= 0.4
    assert both["repcol"] == 0


@pytest.mark.slow
def test_captions_depend_on_picture_and_on_sound(clips, capsys):
    both, deaf, blind = (measured(clips, capsys, *options) for options in ((), ("--no-audio",), ("--no-picture",)))
    assert deaf["dialogue_f1"] < 0.2
    assert blind["event_recall"] < 0.5 * both["event_recall"]


def test_default_question_is_that_of_the_checkpoint():
    default, explicit, other = (
        load_captioner(open_checkpoint(SHIPPED), text, "float32").prompt for text in (None, PROMPTS[0], "What?")
    )
    assert default == explicit != other


def test_captions_equal_transformers_with_the_same_weights(clips):
    captioner = load_captioner(open_checkpoint(SHIPPED), None, "float32")
    paths = [clips.parent / json.loads(line)["video"] for line in clips.read_text().splitlines()[:3]]
    media = [read_media(path, captioner.reading) for path in paths]
    rows = [captioner.row(one) for one in media]
    ours = dict(Engine(captioner, 100, slots=2).run([(i, row, 0) for i, row in enumerate(rows)]))
    with torch.no_grad():
        theirs = load_reference(SHIPPED).generate(
            **inputs_of(media, rows, captioner.config),
            do_sample=False,
            max_new_tokens=100,
            suppress_tokens=np.flatnonzero(captioner.banned).tolist(),
            eos_token_id=list(captioner.stops),
            pad_token_id=captioner.stops[0],
        )
    produced = theirs[:, max(len(row.prompt_ids) for row in rows) :].numpy()  # prompts are padded on their left
    for i, same in enumerate(produced):
        assert 20 < len(ours[i]) < 100
        np.testing.assert_array_equal(ours[i], same[: len(ours[i])])

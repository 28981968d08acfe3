"""The model against the torch reference, in fp32, through the production converter."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import inputs_of, load_reference, random_media, rows_of, write_reference

from avocado_jax.checkpoint.hf import open_hf, table
from avocado_jax.checkpoint.load import load_params
from avocado_jax.data.rows import fit, rounded, shape_of, stack
from avocado_jax.models.audio import AudioLayer, AudioTower
from avocado_jax.models.config import SIZES, TINY, computed
from avocado_jax.models.rope import patch_rope, text_rope
from avocado_jax.models.text import TextLayer
from avocado_jax.models.thinker import Thinker, example, init
from avocado_jax.models.vision import VisionLayer, VisionTower
from avocado_jax.sampling.generate import caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Captions

CONFIG = computed(TINY, "float32", scan=False)
STOPS = (258, 256)
# name: clips as (frames, height, width, samples); sizes with partial windows, odd lengths of mel and frames
BATCHES = {
    "sound": [(6, 112, 140, 16000 * 3 + 37)],
    "silent": [(4, 84, 196, None)],
    "long_sound": [(4, 56, 56, 16000 * 5 + 170)],
    "short_sound": [(9, 252, 56, 8000)],
    "unequal": [(6, 112, 140, 48037), (10, 140, 84, 16000 * 4), (3, 56, 308, 7000)],
    "unequal_silent": [(6, 112, 112, None), (2, 56, 84, None)],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A reference model and our parameters of its checkpoint."""
    folder = tmp_path_factory.mktemp("reference")
    write_reference(folder, TINY)
    checkpoint = open_hf(folder)
    assert computed(checkpoint.config, "float32", scan=False) == CONFIG
    return load_reference(folder), load_params(checkpoint, "float32")


def assert_close(ours, theirs, tolerance):
    """Assert that the largest difference, relative to the largest value, is within the tolerance."""
    ours, theirs = np.asarray(ours), np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def batch(name):
    """Clips of a batch: media, rows, and our stacked batch, padded beyond need."""
    media = [random_media(*sizes, seed=i) for i, sizes in enumerate(BATCHES[name])]
    rows = rows_of(media, CONFIG)
    clips = [row.clip for row in rows]
    return media, rows, jax.tree.map(jnp.asarray, stack(clips, rounded(fit([shape_of(clip) for clip in clips]))))


def recorded(modules):
    """Record inputs and outputs of torch modules. Returns the records, which are filled when the modules run."""
    records = [{} for _ in modules]
    for module, record in zip(modules, records):

        def keep(_, args, kwargs, output, record=record):
            record["input"] = args[0] if args else kwargs["hidden_states"]
            record["output"] = output[0] if isinstance(output, tuple) else output
            record["kwargs"] = kwargs

        module.register_forward_hook(keep, with_kwargs=True)
    return records


def sizes(part):
    return {"width": part.width, "heads": part.heads, "ffn": part.ffn, "kernel": CONFIG.kernel, **CONFIG.dtypes}


def test_vision_tower_and_layers(reference):
    model, params = reference
    media, rows, clip = batch("sound")
    tower = model.model.visual
    records = recorded(tower.blocks)
    inputs = inputs_of(media, rows, CONFIG)
    with torch.no_grad():
        out = tower(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    # The reference packs the real patches of each window; ours pads windows to 64 slots.
    shape = clip.patches.shape[1:4]
    grid = jnp.broadcast_to(clip.patch_grid, (*shape, 2))
    valid = np.broadcast_to(clip.patch_valid, shape) & (np.arange(shape[0]) < 3)[:, None, None]
    rope = patch_rope(grid, CONFIG.vision.width // CONFIG.vision.heads, CONFIG.vision.rope_theta)
    for number, record in enumerate(records):
        x = np.zeros((*shape, CONFIG.vision.width), np.float32)
        x[valid] = record["input"]
        full = number in CONFIG.vision.full_layers
        layer = {"params": params["vision"][f"layers_{number}"]}
        ours, _ = VisionLayer(**sizes(CONFIG.vision)).apply(layer, jnp.asarray(x), full, rope, jnp.asarray(valid))
        assert_close(np.asarray(ours)[valid], record["output"], 1e-5)
    ours = VisionTower(CONFIG).apply({"params": params["vision"]}, clip.patches[0], grid, jnp.asarray(valid))
    ours, media_index = np.asarray(ours).reshape(-1, CONFIG.text.width), np.asarray(clip.media[0])
    assert_close(
        ours[media_index[(media_index >= 0) & (media_index < len(ours))]], out, 1e-5
    )  # raster order, as in the prompt


@pytest.mark.parametrize("samples", [16000 * 3 + 37, 16000 * 5 + 170, 8000, 700])
def test_audio_tower_and_layers(reference, samples):
    model, params = reference
    media = [random_media(2, 56, 56, samples)]
    rows = rows_of(media, CONFIG)
    clip, inputs = rows[0].clip, inputs_of(media, rows, CONFIG)
    tower = model.model.audio_tower
    records = recorded(tower.layers)
    with torch.no_grad():
        out = tower(inputs["input_features"][0], inputs["feature_attention_mask"].sum(-1)).last_hidden_state
    valid = np.arange(CONFIG.audio.window) < ((clip.mel_length - 1) // 2 + 1)[:, None]
    for number, record in enumerate(records):
        x = np.zeros((*valid.shape, CONFIG.audio.width), np.float32)
        x[valid] = record["input"]
        layer = {"params": params["audio"][f"layers_{number}"]}
        ours, _ = AudioLayer(**sizes(CONFIG.audio)).apply(layer, jnp.asarray(x), None, jnp.asarray(valid))
        assert_close(np.asarray(ours)[valid], record["output"], 1e-5)
    ours = AudioTower(CONFIG).apply({"params": params["audio"]}, jnp.asarray(clip.mel), jnp.asarray(clip.mel_length))
    assert_close(np.asarray(ours).reshape(-1, CONFIG.text.width)[: len(out)], out, 1e-5)


def test_text_layers(reference):
    model, params = reference
    media, rows, _ = batch("unequal")
    records = recorded(model.model.language_model.layers)
    with torch.no_grad():
        model(**inputs_of(media[:1], rows[:1], CONFIG))
    text = CONFIG.text
    clip = rows[0].clip
    positions = np.concatenate([clip.positions, np.full((1, 3), clip.start)])
    rope = text_rope(jnp.asarray(positions)[None], text.head, text.rope_theta, text.mrope_sections)
    for number, record in enumerate(records):
        x = jnp.asarray(record["input"].numpy())
        layer = {"params": params["text"][f"layers_{number}"]}
        ours, _ = TextLayer(text, kernel=CONFIG.kernel, **CONFIG.dtypes).apply(layer, x, None, rope, None, None)
        assert_close(ours, record["output"], 1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_logits_positions_and_greedy_tokens(reference, name):
    model, params = reference
    media, rows, clip = batch(name)
    inputs = inputs_of(media, rows, CONFIG)
    mels = inputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in inputs else None
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        None,
        inputs["video_grid_thw"],
        inputs["attention_mask"],
        inputs["use_audio_in_video"],
        mels,
        inputs["video_second_per_grid"],
    )
    for i, row in enumerate(rows):
        theirs = positions[:, i, -len(row.prompt_ids) :].numpy().T
        np.testing.assert_array_equal(row.clip.positions, theirs[:-1])
        np.testing.assert_array_equal([row.clip.start] * 3, theirs[-1])

    length = 12
    banned = np.arange(CONFIG.text.vocab) >= 256
    banned[list(STOPS)] = False
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": STOPS[0]}
    theirs = model.generate(
        **inputs,
        max_new_tokens=length,
        suppress_tokens=np.flatnonzero(banned).tolist(),
        eos_token_id=list(STOPS),
        **options,
    )
    keys = caption_keys(jax.random.key(0), jnp.arange(len(rows)), 1)
    ours = generate(
        params, clip, keys, jnp.asarray(banned), config=CONFIG, sampling=Sampling(0.0), stops=STOPS, length=length
    )
    produced = theirs.sequences[:, inputs["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(ours.tokens[:, 0, : produced.shape[1]], produced)
    logits = np.stack([step.numpy() for step in theirs.logits], axis=1)

    # The same logits from all tokens of the caption in one pass.
    given = np.concatenate([np.asarray(clip.first)[:, None], produced[:, :-1]], axis=1)[:, None]
    assert_close(caption_logits(params, clip, jnp.asarray(given))[:, 0], logits, 1e-4)
    logprobs = torch.log_softmax(torch.tensor(logits), -1).numpy()
    drawn = np.take_along_axis(logprobs, produced[..., None], axis=-1)[..., 0]
    for i, count in enumerate(np.asarray(ours.lengths)[:, 0]):
        np.testing.assert_allclose(ours.logprobs[i, 0, :count], drawn[i, :count], atol=2e-4)


@jax.jit
def caption_logits(params, clip, inputs):
    """Logits at every input of teacher-forced captions."""
    apply = partial(Thinker(CONFIG).apply, {"params": params})
    return apply(apply(clip, Captions(inputs, inputs, inputs >= 0)), method="logits")


def loss_of(config, params, clip, captions):
    """Mean cross-entropy of the valid targets."""
    apply = partial(Thinker(config).apply, {"params": params})
    logprobs = jax.nn.log_softmax(apply(apply(clip, captions), method="logits"))
    chosen = jnp.take_along_axis(logprobs, captions.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen, where=captions.valid) / jnp.sum(captions.valid)


def random_captions(clip, lengths, seed=0):
    """Teacher-forced random captions, [rows, group] lengths."""
    lengths = np.asarray(lengths)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 250, (*lengths.shape, lengths.max()))
    first = np.broadcast_to(np.asarray(clip.first)[:, None, None], (*lengths.shape, 1))
    inputs = np.concatenate([first, targets[..., :-1]], axis=-1)
    valid = np.arange(lengths.max()) < lengths[..., None]
    return Captions(*map(jnp.asarray, (inputs.astype(np.int32), targets.astype(np.int32), valid)))


def test_loss_and_gradients(reference):
    model, params = reference
    media, rows, clip = batch("unequal")
    captions = random_captions(clip, [[9], [5], [12]])
    value, gradients = jax.jit(jax.value_and_grad(partial(loss_of, CONFIG)))(params, clip, captions)

    texts = [np.asarray(captions.targets)[i, 0, :n].tolist() for i, n in enumerate([9, 5, 12])]
    inputs = dict(inputs_of(media, rows, CONFIG, texts))
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, text in enumerate(texts):
        labels[i, -len(text) :] = torch.tensor(text)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert abs(value - loss.item()) <= 1e-4 * abs(loss.item())

    entries = table(CONFIG)
    theirs = {name.replace("model.language_model.", "model."): p.grad for name, p in model.named_parameters()}
    for name, entry in entries.items():
        node = gradients
        for key in entry.path:
            node = node[f"layers_{entry.layer}" if key == "layers" else key]
        inner = name if name in theirs else f"model.{name}"
        expected = theirs[inner].numpy()
        difference = np.linalg.norm(entry.change.theirs(np.asarray(node), entry.shape) - expected)
        assert difference <= 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_group_of_captions_equals_separate_rows(reference, gradients):
    """G captions on one clip: the logits, loss and gradients of G rows that repeat the clip (models/README.md)."""
    _, params = reference
    _, _, clip = batch("unequal")
    lengths = [[9, 4, 12], [1, 7, 3], [12, 2, 5]]
    captions = random_captions(clip, lengths)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), clip)
    rows = jax.tree.map(lambda leaf: leaf.reshape(9, 1, *leaf.shape[2:]), captions)
    if not gradients:  # tests/train/test_grpo.py compares gradients too
        grouped = caption_logits(params, clip, captions.inputs)
        assert_close(caption_logits(params, repeated, rows.inputs).reshape(grouped.shape), grouped, 1e-5)
        return
    step = jax.jit(jax.value_and_grad(partial(loss_of, CONFIG)))
    grouped, separate = step(params, clip, captions), step(params, repeated, rows)
    assert abs(grouped[0] - separate[0]) <= 1e-5 * abs(separate[0])
    for ours, theirs in zip(jax.tree.leaves(grouped[1]), jax.tree.leaves(separate[1])):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_stacked_layers_equal_separate_layers(reference):
    _, params = reference
    scanned = computed(TINY, "float32", scan=True, remat="full")
    _, _, clip = batch("sound")
    captions = random_captions(clip, [[5, 8]])
    stacked = stack_layers(params)
    assert jax.tree.structure(unstack(stacked)) == jax.tree.structure(params)
    step = lambda config: jax.jit(jax.value_and_grad(partial(loss_of, config)))  # noqa: E731
    value, gradients = step(CONFIG)(params, clip, captions)
    value_scanned, gradients_scanned = step(scanned)(stacked, clip, captions)
    assert abs(value - value_scanned) <= 1e-6 * abs(value)
    for ours, theirs in zip(jax.tree.leaves(unstack(gradients_scanned)), jax.tree.leaves(gradients)):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def unstack(tree):
    """Convert parameters of `scan=True` to those of `scan=False`."""
    out = {}
    for key, value in tree.items():
        if key == "layers":
            count = len(jax.tree.leaves(value)[0])
            out |= {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(count)}
        else:
            out[key] = unstack(value) if isinstance(value, dict) else value
    return out


def stack_layers(tree):
    """The inverse of `unstack`."""
    if not isinstance(tree, dict):
        return tree
    layers = [tree[f"layers_{i}"] for i in range(sum(key.startswith("layers_") for key in tree))]
    out = {key: stack_layers(value) for key, value in tree.items() if not key.startswith("layers_")}
    return out | ({"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)} if layers else {})


def test_no_array_holds_the_vocabulary_for_every_clip_token():
    """Neither in the forward nor in the backward pass."""
    config = computed(TINY, "float32", scan=True, remat="full")
    clip, captions = example(config, rows=1, group=2)
    clip = clip._replace(
        **{
            name: jax.ShapeDtypeStruct((1, 777, *getattr(clip, name).shape[2:]), "int32")
            for name in ("tokens", "media")
        },
        positions=jax.ShapeDtypeStruct((1, 777, 3), "int32"),
    )
    params = jax.eval_shape(partial(init, config), jax.random.key(0))
    jaxpr = jax.make_jaxpr(jax.grad(partial(loss_of, config)))(params, clip, captions)
    text = str(jaxpr)
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"\w+\[([\d,]+)\]", text)]
    assert any(777 in shape for shape in shapes)
    assert any(config.text.vocab in shape for shape in shapes)
    assert not any(777 in shape and config.text.vocab in shape for shape in shapes)


@pytest.mark.parametrize(("size", "parameters"), [("7b", 8_931_806_720), ("3b", None)])
def test_full_size_shapes(size, parameters):
    """Every parameter of the published sizes has its name; nothing is allocated."""
    config = SIZES[size]
    tree = jax.eval_shape(partial(init, config), jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    entries = table(config)
    assert sum(math.prod(entry.shape) for entry in entries.values()) == count
    if parameters:
        assert count == parameters
        assert count + 2 * config.audio.out == 8_931_813_888  # with the unused audio_bos_eos_token
        assert len(entries) + 1 == 1346

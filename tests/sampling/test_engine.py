"""Captions of the engine equal those of single clips, for any slots, order and mesh."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_media

from avocado_jax.data.rows import rounded, shape_of, stack
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.data.words import load_words
from avocado_jax.models.config import TINY, computed
from avocado_jax.models.thinker import Thinker, init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import compile_ahead, counts
from avocado_jax.parallel.mesh import make_mesh, with_tensor
from avocado_jax.parallel.rules import shardings
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.sampling import arrivals, engine, lane
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.batch import Captioning, batch_programs, caption_batch
from avocado_jax.sampling.captioner import captioner_of
from avocado_jax.sampling.engine import Engine
from avocado_jax.sampling.generate import caption_keys, generate
from avocado_jax.sampling.logits import GREEDY, Sampling

SMALL = replace(TINY, audio=replace(TINY.audio, layers=1), vision=replace(TINY.vision, layers=2))
CONFIG = computed(SMALL, "float32", scan=False)
LENGTH = 40
SEED = 5
# Frames, height, width and samples: two shapes of one number of padded tokens, and one of another.
SIZES = [(4, 56, 84, 16000), (6, 112, 56, None)]
LARGER = (8, 112, 140, None)
WARM = Sampling(temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Random weights whose captions have unequal lengths, some of them at the limit."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 1.0 if path[0].key == "embedding" else 0.3 if len(leaf.shape) < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale + (path[-1].key == "scale"))

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(partial(init, CONFIG), jax.random.key(0)))
    stops = tuple(range(60, 84))
    made = captioner_of(CONFIG, params, load_words(folder), stops, "What?")
    banned = made.banned.copy()
    banned[list(stops)] = False
    return made._replace(banned=banned)


@pytest.fixture(scope="module")
def rows(captioner):
    clips = [random_media(*SIZES[i % len(SIZES)], seed=i) for i in range(10)]
    return [captioner.row(clip, {"prompt": f"What? {'Why? ' * (i % 3)}"}) for i, clip in enumerate(clips)]


@pytest.fixture(scope="module")
def one_by_one(captioner, rows):
    """Tokens of each clip decoded alone, for each sampling setting."""

    def caption(number, row, sampling):
        clip = stack([row.clip], rounded(shape_of(row.clip), arrivals.SHAPE_BITS))
        keys = caption_keys(jax.random.key(SEED), np.array([number]), 1)
        options = dict(config=CONFIG, sampling=sampling, stops=captioner.stops, length=LENGTH)
        samples = generate(captioner.params, clip, keys, captioner.banned, **options)
        return samples.tokens[0, 0, : samples.lengths[0, 0]].tolist()

    found = {way: [caption(i, row, way) for i, row in enumerate(rows)] for way in (GREEDY, WARM)}
    lengths = {len(tokens) for tokens in found[GREEDY]}
    assert len(lengths) > 4, [len(tokens) for tokens in found[GREEDY]]
    assert max(lengths) == LENGTH
    assert found[GREEDY] != found[WARM]
    return found


def run(captioner, rows, order, slots, sampling=GREEDY, stream=False):
    """Tokens by clip."""
    requests = [(i, rows[i], i) for i in order]
    made = Engine(captioner, LENGTH, sampling, SEED, slots).run(iter(requests) if stream else requests)
    return {number: tokens.tolist() for number, tokens in made}


@pytest.mark.parametrize(("slots", "sampling", "stream"), [(1, GREEDY, False), (3, GREEDY, True), (3, WARM, True)])
def test_captions_do_not_depend_on_slots_or_order(captioner, rows, one_by_one, slots, sampling, stream):
    """Ten clips of two shapes through few slots: every slot is refilled."""
    order = np.random.default_rng(slots).permutation(len(rows)).tolist()
    made = run(captioner, rows, order, slots, sampling, stream)
    assert made == dict(enumerate(one_by_one[sampling]))


@pytest.mark.parametrize("sizes", [(4, 2), *(pytest.param(one, marks=pytest.mark.slow) for one in ((8, 1), (2, 4)))])
def test_captions_over_a_mesh_equal_one_device(captioner, rows, one_by_one, sizes):
    mesh = make_mesh(data=sizes[0], fsdp=1, tensor=sizes[1], devices=jax.devices()[:8])
    divided = captioner._replace(params=jax.device_put(captioner.params, shardings(captioner.params, mesh)))
    assert run(divided, rows, range(len(rows)), 8) == dict(enumerate(one_by_one[GREEDY]))


@pytest.fixture
def long_and_short(one_by_one, monkeypatch):
    """Two clips of one shape: the caption of the first takes at least four times the dispatches of the second."""
    monkeypatch.setattr(programs, "STEPS", 1)
    monkeypatch.setattr(lane, "PATIENCE", 1)
    jax.clear_caches()  # `STEPS` is a constant of the program
    lengths = {i: len(tokens) for i, tokens in enumerate(one_by_one[GREEDY]) if i % 2 == 0}
    long, short = max(lengths, key=lengths.get), min(lengths, key=lengths.get)
    assert lengths[long] >= 4 * lengths[short]
    yield long, short, lengths[long], lengths[short]
    jax.clear_caches()


def test_finished_slot_is_refilled_while_others_decode(captioner, rows, long_and_short, monkeypatch):
    """One slot decodes the long caption, the other decodes short ones in the same time."""
    long, short, many, few = long_and_short
    dispatches = []
    advance = lane.Lane.advance
    monkeypatch.setattr(lane.Lane, "advance", lambda self: (dispatches.append(1), advance(self)))
    order = [long] + [short] * (many // few)
    made = list(Engine(captioner, LENGTH, GREEDY, SEED, 2).run([(i, rows[i], i) for i in order]))
    assert len(made) == len(order)
    assert many <= len(dispatches) <= many + 1


def test_dropped_request_frees_its_slot(captioner, rows, long_and_short, monkeypatch):
    """With one slot, the long caption is dropped after three tokens. A request dropped earlier is not prefilled."""
    long, short, many, few = long_and_short
    dispatches, admitted = [], []
    advance, take = lane.Lane.advance, programs.admit
    monkeypatch.setattr(lane.Lane, "advance", lambda self: (dispatches.append(1), advance(self)))
    monkeypatch.setattr(programs, "admit", lambda *args, **kwargs: (admitted.append(1), take(*args, **kwargs))[1])

    def drop(item, tokens):
        return item == "never" or (item == long and len(tokens) >= 3)

    requests = [(long, rows[long], long), ("never", rows[long], 0), (short, rows[short], short)]
    made = list(Engine(captioner, LENGTH, GREEDY, SEED, 1, drop=drop).run(requests))
    assert [item for item, _ in made] == [short]
    assert len(dispatches) <= 3 + few + 1 < many + few
    assert len(admitted) == 2


def test_out_of_memory_halves_the_slots(captioner, rows, one_by_one, monkeypatch):
    """With the minimum of slots, only the clips of that shape fail, once each. None is a valid item."""
    real, small = programs.admit, rounded(shape_of(rows[0].clip), arrivals.SHAPE_BITS)
    failing = {4, 2}

    def admit(slots, params, clips, *rest, **options):
        if clips.patches.shape[1:3] == small[1:3] and len(slots.step) in failing:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
        return real(slots, params, clips, *rest, **options)

    monkeypatch.setattr(programs, "admit", admit)
    requests = [(i or None, row, i) for i, row in enumerate(rows)]
    made = list(Engine(captioner, LENGTH, slots=4).run(requests))
    assert len(made) == len(rows)
    assert {item or 0: tokens.tolist() for item, tokens in made} == dict(enumerate(one_by_one[GREEDY]))
    failing.add(1)
    made = dict(Engine(captioner, LENGTH, slots=4).run(requests))
    for i, row in enumerate(rows):
        if rounded(shape_of(row.clip), arrivals.SHAPE_BITS) == small:
            assert isinstance(made[i or None], jax.errors.JaxRuntimeError)
        else:
            assert made[i].tolist() == one_by_one[GREEDY][i]


def test_other_errors_of_the_devices_are_raised(captioner, rows, monkeypatch):
    def advance(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    monkeypatch.setattr(programs, "advance", advance)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        list(Engine(captioner, LENGTH, slots=2).run([(0, rows[0], 0)]))


def test_clips_of_other_lanes_are_served_in_bounded_time(captioner, rows, long_and_short, monkeypatch):
    """A lane that has captioned its share admits no more clips, also while one of its slots is busy."""
    monkeypatch.setattr(engine, "LANE_ROUNDS", 1)
    long, short, *_ = long_and_short
    order, other = [long, -1] + [short] * 8, captioner.row(random_media(*LARGER), {})
    lanes = {rounded(shape_of(row.clip), arrivals.SHAPE_BITS).tokens for row in (rows[0], rows[1], other)}
    assert len(lanes) == 2
    requests = [(i, other if i < 0 else rows[i], abs(i)) for i in order]
    made = [item for item, _ in Engine(captioner, LENGTH, GREEDY, SEED, 2).run(requests)]
    assert len(made) == len(order)
    assert made.index(-1) == 2


def test_rare_shapes_of_a_lane_are_served_in_bounded_time(rows, monkeypatch):
    """Pairs of one shape are prefilled before a single older clip of another shape, but only for a bounded time."""
    monkeypatch.setattr(lane, "PREFILL_TOKENS", 2 * rounded(shape_of(rows[0].clip), arrivals.SHAPE_BITS).tokens)
    monkeypatch.setattr(programs, "empty", lambda *_: None)
    monkeypatch.setattr(programs, "admit", lambda *_: None)
    waiting = arrivals.Arrivals([(i, rows[min(i, 1)], 0) for i in range(40)], None)
    waiting.receive()
    how = lane.Decoding(SimpleNamespace(config=None, params=None), None, 1, LENGTH, GREEDY, 0)
    one = lane.Lane(how, waiting.shapes()[0].tokens, 8, lambda _: None)
    one._in_slots[0] = arrivals.Request("decodes", rows[0], 0)
    admitted = []
    for _ in range(100):
        one.prepare(waiting)
        one.admit(waiting)
        admitted += [request.item for request in one._in_slots[1:] if request]
        one._in_slots[1:] = [None] * 7
    assert sorted(admitted) == list(range(40))
    assert 0 < admitted.index(0) <= 2 * lane.PATIENCE + 2


def test_the_next_clips_are_stacked_while_the_devices_decode(captioner, rows, monkeypatch):
    """Between the dispatch of decoding steps and the wait for their results; each clip once."""
    events = []

    def record_calls(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (events.append(name), real(*args))[1])

    record_calls(lane, "stack")
    for name in ("advance", "finished"):
        record_calls(lane.Lane, name)
    requests = [(i, rows[i], i) for i in (0, 2, 4)]
    assert len(list(Engine(captioner, LENGTH, GREEDY, SEED, 1).run(requests))) == 3
    assert events[:4] == ["stack", "advance", "stack", "finished"]
    assert events.count("stack") == 3


@pytest.mark.parametrize("slots", [3, 8])
def test_captions_do_not_depend_on_the_window(captioner, rows, one_by_one, slots, monkeypatch):
    """Caches of 40 tokens are read in windows of 8, 16 and 32; each program is announced once."""
    monkeypatch.setattr(programs, "WINDOW", 8)
    announced = []
    made = Engine(captioner, LENGTH, GREEDY, SEED, slots, report=announced.append).run(
        [(i, row, i) for i, row in enumerate(rows)]
    )
    assert {number: tokens.tolist() for number, tokens in made} == dict(enumerate(one_by_one[GREEDY]))
    windows = [line for line in announced if "decoding" in line]
    assert windows == [f"decoding of {slots} captions behind {width} tokens" for width in (8, 16, 32)]
    assert len(set(announced)) == len(announced) == 5  # and two shapes are prefilled


def test_window_sizes():
    assert [programs.window_of(2048, steps) for steps in (1, 256, 257, 1025, 2048, 2060)] == [
        256, 256, 512, 2048, 2048, 2048
    ]  # fmt: skip
    assert programs.window_of(40, 32) == 40


def test_no_cache_moves_between_devices(captioner, rows):
    """Compiled for data 4 x tensor 2: devices exchange few bytes compared with the caches of one device."""
    mesh = make_mesh(data=4, fsdp=1, tensor=2, devices=jax.devices()[:8])
    params = jax.device_put(captioner.params, shardings(captioner.params, mesh))
    shape = rounded(shape_of(rows[0].clip), arrivals.SHAPE_BITS)
    clips = jax.device_put(stack([rows[0].clip] * 4, shape), rows_sharding(mesh))
    where, index = (CONFIG, mesh), np.zeros((4, 1), np.int32)
    with jax.set_mesh(mesh):
        slots = programs.empty(*where, shape.tokens, 8, LENGTH)
        of_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(slots.cache.layers))
        assert of_device == sum(leaf.nbytes for leaf in jax.tree.leaves(slots.cache.layers)) / 8
        admit = programs.admit.lower(slots, params, clips, None, np.uint32(0), index.reshape(-1), index, *where)
        advance = programs.advance.lower(slots, params, captioner.banned, *where, GREEDY, captioner.stops, LENGTH)
        for lowered in (admit, advance):
            sent = collective_bytes(lowered.compile().as_text(), programs.STEPS)
            moved = sum(sent[kind] for kind in ("all-gather", "all-to-all", "collective-permute"))
            assert moved < 0.1 * of_device, sent


@pytest.mark.parametrize(
    ("sizes", "tensor"),
    [((1, 4, 1), 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in (((2, 2, 2), 2), ((1, 2, 2), 4)))],
)
def test_batch_on_the_mesh_equals_single_captions(captioner, rows, one_by_one, sizes, tensor, monkeypatch):
    """In two parts; rows of zero weight get no caption, and nothing is compiled after `batch_programs`.

    The mesh of the parameters may have a larger `tensor` axis than that of the clips. Programs are traced on it.
    """
    traced = {}
    for run in (programs.caption_keys, programs.draw_tokens):  # of prefill and of decoding

        def record(*args, name=run.__name__, run=run):
            traced.setdefault(name, set()).add(jax.sharding.get_abstract_mesh().shape["tensor"])
            return run(*args)

        monkeypatch.setattr(programs, run.__name__, record)
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    sampler = with_tensor(mesh, tensor)
    params = jax.device_put(captioner.params, shardings(captioner.params, sampler, over=("tensor",)))
    order, weight = [0, 2, 4, 6, 8, 0, 2, 4], np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)
    shape = rounded(shape_of(rows[0].clip), arrivals.SHAPE_BITS)
    by_row = rows_sharding(mesh)
    clips = jax.device_put(stack([rows[i].clip for i in order], shape), by_row)
    how = Captioning(CONFIG, sampler, captioner.stops, LENGTH, parts=2)
    encode = jax.jit(partial(Thinker(CONFIG).apply, {"params": params}, method="encode"), out_shardings=by_row)
    weight = jax.device_put(weight, by_row)
    with jax.set_mesh(mesh):
        encoded = encode(jax.device_put(stack([rows[i].clip for i in order[:4]], shape), by_row))
        compile_ahead(batch_programs(params, clips, weight, encoded, captioner.banned, how))
        before = counts().compiled + counts().read
        slots = caption_batch(params, clips, weight, encode, captioner.banned, how)
        assert counts().compiled + counts().read == before
    assert traced == {"caption_keys": {tensor}, "draw_tokens": {tensor}}
    tokens, steps = jax.device_get((slots.tokens, slots.step))
    for row, (clip, counted) in enumerate(zip(order, np.asarray(weight))):
        expected = one_by_one[GREEDY][clip] if counted else []
        assert tokens[row, : steps[row]].tolist() == expected, row


@pytest.mark.parametrize("error", [OSError("the disk is gone"), MemoryError("the disk is gone")])
def test_error_of_the_request_iterator_is_raised(captioner, rows, one_by_one, error):
    """It is raised after the captions of earlier clips, also if it looks like a device error."""

    def requests():
        yield 0, rows[0], 0
        raise error

    made = Engine(captioner, LENGTH, GREEDY, SEED, 2).run(requests())
    item, tokens = next(made)
    assert (item, tokens.tolist()) == (0, one_by_one[GREEDY][0])
    with pytest.raises(type(error), match="the disk is gone"):
        next(made)


def test_number_of_slots_follows_memory(captioner, rows):
    """A slot needs memory for keys and values of its clip and caption in every layer."""
    tokens, text = shape_of(rows[0].clip).tokens, CONFIG.text
    slot = 2 * text.layers * text.kv_heads * text.head * (tokens + LENGTH) * 4
    for given, expected in (
        (dict(slots=3), 3),
        (dict(), engine.CPU_SLOTS),
        (dict(cache_bytes=5 * slot + 1), 5),
        (dict(cache_bytes=0), 1),
        (dict(cache_bytes=1000 * slot), engine.MOST_SLOTS),
    ):
        assert Engine(captioner, LENGTH, **given).slots(tokens) == expected
    mesh = make_mesh(data=4, fsdp=1, tensor=2, devices=jax.devices()[:8])
    divided = captioner._replace(params=jax.device_put(captioner.params, shardings(captioner.params, mesh)))
    assert Engine(divided, LENGTH, slots=5).slots(tokens) == 8
    assert text.kv_heads % 2 == 0
    assert Engine(divided, LENGTH, cache_bytes=5 * slot).slots(tokens) == 4 * 10


def test_memory_for_caches(captioner, monkeypatch):
    """The usable share of a device's memory minus the parameters; a CPU reports no memory."""
    assert engine.free_cache_bytes(captioner.params) is None

    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    leaf = SimpleNamespace(addressable_shards=[SimpleNamespace(device=device, data=np.zeros(100, np.int8))])
    assert engine.free_cache_bytes({"a": leaf, "b": leaf}) == engine.USABLE * 1000 - 200

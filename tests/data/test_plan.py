import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avocado_jax.data.features import choose_frames, frame_pixels, frame_size
from avocado_jax.data.index import Index, Sizes, sizes
from avocado_jax.data.plan import Bucket, Plan, choose_buckets, make_plan, row_flops
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.models import flops
from avocado_jax.models.config import SEVEN_B, TINY

PICTURES = [(360, 640), (480, 854), (720, 1280), (1080, 1920), (640, 360), (1280, 720), (480, 640), (720, 720)]


def realistic_sizes(clips: int, seed: int = 0) -> Index:
    """Sizes of clips of 4-100 s in several resolutions under AVoCaDO's budget, one in twenty silent."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(4, 100, clips)
    rows = []
    for length in seconds:
        frames = len(choose_frames(int(length * 25), 25.0))
        height, width = frame_size(*PICTURES[rng.integers(len(PICTURES))], 128 * 28 * 28, frame_pixels(frames))
        mel = 0 if rng.random() < 0.05 else int(length * 100)
        rows.append((frames, height, width, mel, int(np.clip(rng.lognormal(6.2, 0.35), 100, 1023))))
    frames, height, width, mel, caption = np.array(rows).T
    none = np.zeros(clips, np.int64)
    ids = [f"{number}" for number in range(clips)]
    return Index(ids, seconds, none, none, frames, height, width, mel, caption, none, "token")


def random_sizes(clips: int, seed: int) -> Sizes:
    rng = np.random.default_rng(seed)
    shape = Shape(*(rng.integers(1, most, clips) for most in (900, 40, 6, 12)))
    return Sizes(shape, rng.integers(2, 100, clips))


def make_random_plan(clips: int, buckets: int, batch: int, seed: int) -> tuple[Sizes, Plan]:
    needed = random_sizes(clips, seed)
    return needed, make_plan(needed, choose_buckets(needed, buckets, 1, TINY), batch, seed, 1, TINY)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(1, 6), st.integers(1, 16), st.integers(0, 5))
def test_every_record_occurs_once_per_epoch_in_its_bucket(clips, buckets, batch, seed):
    needed, plan = make_random_plan(clips, buckets, batch, seed)
    table = np.column_stack([*needed.shape, needed.caption])
    assert len(plan.buckets) <= buckets
    for epoch in (0, 3):
        planned_records = []
        for step in range(epoch * plan.epoch_steps, (epoch + 1) * plan.epoch_steps):
            at = plan.step(step)
            assert (at.step, at.epoch, len(at.records)) == (step, epoch, batch)
            real = at.records[at.records >= 0]
            assert len(real)
            assert (table[real] <= (*at.bucket.shape, at.bucket.caption)).all()
            planned_records += real.tolist()
        assert sorted(planned_records) == list(range(clips))


@pytest.mark.parametrize(("clips", "together", "spares"), [(150, 3, 2), (13, 1, 1)])
def test_spare_batches_follow_the_batches_of_their_rollout(clips, together, spares):
    """An epoch has every record once; rows without a record are in spare batches first."""
    needed = random_sizes(clips, 2)
    plan, without = (
        make_plan(needed, choose_buckets(needed, 3, 1, TINY), 4, 1, 1, TINY, together, n) for n in (spares, 0)
    )
    size = together + spares
    assert plan.epoch_steps % size == 0
    batches = [plan.step(number) for number in range(plan.epoch_steps)]
    used = np.concatenate([batch.records for batch in batches])
    assert sorted(used[used >= 0]) == list(range(clips))
    steps = plan.epoch_steps // size * together
    learned = [plan.position(step) for step in range(steps)]
    for first in range(0, plan.epoch_steps, size):
        block = batches[first : first + size]
        assert len({one.bucket for one in block}) == 1
        assert [number for number in range(first, first + size) if number in learned] == [
            *range(first, first + together)
        ]
        assert list(plan.spare_positions(first // size * together)) == [*range(first + together, first + size)]
        if (np.concatenate([one.records for one in block[:together]]) < 0).any():
            assert (np.concatenate([one.records for one in block[together:]]) < 0).all()
    assert plan.spare_positions(together - 1) == plan.spare_positions(0)
    assert plan.digest != without.digest
    assert [without.position(step) for step in range(9)] == [*range(9)]
    assert not without.spare_positions(0)


@pytest.mark.parametrize(("clips", "together"), [(150, 4), (13, 3)])
def test_steps_of_one_rollout_have_one_bucket(clips, together):
    """Each record is in the epoch once, and empty positions are spread over the steps of a block."""
    sizes = random_sizes(clips, 1)
    plan = make_plan(sizes, choose_buckets(sizes, 3, 1, TINY), 4, 1, 1, TINY, together)
    assert plan.digest != make_plan(sizes, list(plan.buckets), 4, 1, 1, TINY).digest
    assert plan.epoch_steps % together == 0
    steps, records = [plan.step(number) for number in range(plan.epoch_steps)], []
    for first in range(0, plan.epoch_steps, together):
        block = steps[first : first + together]
        assert len({step.bucket for step in block}) == 1
        counts = [(step.records >= 0).sum() for step in block]
        assert max(counts) - min(counts) <= 1
        records += [record for step in block for record in step.records if record >= 0]
    assert sorted(records) == list(range(clips))


def test_leftovers_fill_larger_buckets():
    big, small = Bucket(Shape(8, 8, 8, 8), 8), Bucket(Shape(4, 4, 4, 4), 4)
    plan = Plan((big, small), np.array([2.0, 1.0]), np.array([0] * 5 + [1] * 6), np.ones(11), batch=4, seed=0)
    steps = [plan.step(number) for number in range(plan.epoch_steps)]
    assert plan.epoch_steps == 3  # 11 records in batches of 4: one row is empty
    assert sum((step.records < 0).sum() for step in steps) == 1
    assert sorted(step.padded for step in steps) == [0.0, 0.5, 0.625]  # all small, all large, and the mixed one


def test_order_depends_only_on_seed_and_epoch():
    needed, plan = make_random_plan(60, 3, 4, 1)
    again = make_random_plan(60, 3, 4, 1)[1]
    one, two = ([at.step(number).records.tolist() for number in range(plan.epoch_steps)] for at in (plan, again))
    assert one == two
    other = make_plan(needed, list(plan.buckets), 4, 2, 1, TINY)
    assert plan.digest == again.digest != other.digest
    assert one != [other.step(number).records.tolist() for number in range(plan.epoch_steps)]
    assert one != [plan.step(plan.epoch_steps + number).records.tolist() for number in range(plan.epoch_steps)]


def test_steps_are_computed_independently():
    plan, fresh = (make_random_plan(60, 3, 4, 1)[1] for _ in range(2))
    far = 7 * plan.epoch_steps + 3
    for number in range(20):
        plan.step(number)
    np.testing.assert_array_equal(plan.step(far).records, fresh.step(far).records)


def test_padded_share_with_sixteen_shapes():
    """The limit is a quarter of the FLOPs of full epochs, including empty rows at the end."""
    needed = sizes(realistic_sizes(1500), 150, 1024, SEVEN_B)
    shares = {}
    for group, count in ((1, 4), (1, 16), (1, 32), (8, 16)):
        plan = make_plan(needed, choose_buckets(needed, count, group, SEVEN_B), 8, 0, group, SEVEN_B)
        assert len(plan.buckets) <= count
        shares[group, count] = plan.padded_share()
    assert shares[1, 16] < 0.20
    assert shares[8, 16] < 0.25
    assert shares[1, 4] > shares[1, 16] > shares[1, 32]


def test_buckets_are_aligned_and_sorted():
    needed = sizes(realistic_sizes(200), 150, 1024, SEVEN_B)
    buckets = choose_buckets(needed, 8, 1, SEVEN_B)
    assert all(bucket.shape.tokens % 128 == 0 and bucket.caption % 64 == 0 for bucket in buckets)
    costs = row_flops(np.array([(*bucket.shape, bucket.caption) for bucket in buckets]), 1, SEVEN_B)
    assert (np.diff(costs) <= 0).all()


@pytest.mark.parametrize("config", [SEVEN_B, TINY])
def test_batched_row_sizes_equal_single_ones(config):
    rows = [(16_000, 30, 32, 16, 600), (500, 2, 1, 0, 20)]
    for group in (1, 8):
        each = [flops.row_flops(config, shape, group, caption).total for *shape, caption in rows]
        np.testing.assert_allclose(row_flops(np.array(rows), group, config), each, rtol=1e-12)


def test_records_that_fit_no_bucket_are_listed():
    needed = random_sizes(3, 0)
    with pytest.raises(InputError, match="fits none of the buckets"):
        make_plan(needed, [Bucket(Shape(1, 1, 1, 1), 1)], 2, 0, 1, TINY)
    with pytest.raises(InputError, match="no records"):
        make_plan(random_sizes(0, 0), [Bucket(Shape(1, 1, 1, 1), 1)], 2, 0, 1, TINY)

"""Pictures: frames depend only on time, and shapes follow the script."""

import numpy as np
import pytest

from avocado_jax.world import render as pictures
from avocado_jax.world.director import make_script
from avocado_jax.world.font import bitmap
from avocado_jax.world.render import GROUND, INK, SHAPE_DISTANCES, frame_times, render
from avocado_jax.world.script import LEVELS, Actor, Event, Scene, Script
from avocado_jax.world.vocabulary import BACKDROPS, COLORS, PLACES, SHAPES, WORDS


def make_script_of(*events, shape="square", size="large", backdrop="white", duration=4.0):
    """A script of level 2 with one red shape (number 0) and one blue circle (number 1)."""
    actors = (Actor("red", shape, size, "deep", 0), Actor("blue", "circle", "small", "high", 0))
    scene = Scene(0.0, duration, backdrop, "plain")
    return Script(0, 0, "train", 2, duration, (scene,), actors, events)


def event(kind, start, end, actor=0, other=-1, **slots):
    return Event(kind, start, end, tuple(sorted(slots.items())), actor, other)


def center(frame, color):
    """Center of the pixels of a color (share of the width, of the height), and their number."""
    near = np.abs(frame.astype(int) - INK[color]).sum(-1) < 40
    y, x = np.nonzero(near)
    return x.mean() / frame.shape[1], y.mean() / frame.shape[0], len(x)


def frames_at(script, *times):
    return list(render(script, times))


HERE = event("present", 0.0, 4.0, place="center")


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_frames_depend_only_on_time(level):
    script = make_script(0, 2, "train", level)
    times = frame_times(script, 1.0)
    together = np.stack(list(render(script, times)))
    assert together.shape == (int(script.duration), *LEVELS[level].size, 3)
    assert together.dtype == np.uint8
    alone = [next(iter(render(script, [t]))) for t in times[::-1]][::-1]
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_complete_and_of_the_right_size(shape):
    (frame,) = frames_at(make_script_of(HERE, shape=shape), 0.0)
    x, y, count = center(frame, "red")
    assert (x, y) == pytest.approx((0.5, 0.5), abs=0.04)
    assert count > (0.125 * 224) ** 2 * 0.9
    reach = SHAPE_DISTANCES[shape](np.array([[2.0, -2.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 2.0, -2.0]]))
    assert (reach > 0.2).all()


def test_shapes_are_distinct():
    masks = [frames_at(make_script_of(HERE, shape=shape), 0.0)[0] != GROUND["white"][0] for shape in SHAPES]
    shares = [(a ^ b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert min(shares) > 0.1


@pytest.mark.parametrize("backdrop", BACKDROPS)
@pytest.mark.parametrize("color", COLORS)
def test_shapes_contrast_with_the_background(backdrop, color):
    script = make_script_of(HERE, event("recolor", 0.0, 0.6, color=color, who="red square"), backdrop=backdrop)
    (frame,) = frames_at(script, 1.0)
    row = frame[112].astype(int)
    steps = np.abs(np.diff(row, axis=0)).sum(-1)
    assert (steps > 120).any(), "neither the shape nor its outline differs from the background"


@pytest.mark.parametrize("position", PLACES)
def test_positions_of_shapes(position):
    move = event("move", 1.0, 2.0, place=position)
    before, after = frames_at(make_script_of(event("present", 0.0, 4.0, place="center"), move), 0.9, 2.5)
    assert center(before, "red")[:2] == pytest.approx((0.5, 0.5), abs=0.01)
    assert center(after, "red")[:2] == pytest.approx(PLACES[position], abs=0.01)


def test_entering_and_leaving_shapes():
    enter = event("enter", 1.0, 2.0, place="center", side="left")
    leave = event("leave", 2.5, 3.0, side="top")
    frames = frames_at(make_script_of(enter, leave), 0.5, 1.4, 2.2, 2.7, 3.1)
    visible = [(np.abs(f.astype(int) - INK["red"]).sum(-1) < 40).any() for f in frames]
    assert visible == [False, True, True, True, False]
    assert center(frames[1], "red")[0] < 0.4
    assert center(frames[3], "red")[1] < 0.45


def test_shapes_that_have_left_stay_out_of_view():
    leave, afar = (
        event("leave", 0.2, 1.0, side="left"),
        event("camera", 1.5, 3.3, actor=-1, camera="zoom out"),
    )
    (frame,) = frames_at(make_script_of(HERE, leave, afar), 2.4)
    assert (frame == GROUND["white"][0]).all()


def test_jumping_spinning_and_growing_shapes():
    jump, spin = event("jump", 0.5, 1.5), event("spin", 2.0, 3.0, turn="clockwise")
    grow = event("resize", 3.2, 3.8, resize="shrink")
    rest, up, turned, small = frames_at(make_script_of(HERE, jump, spin, grow, shape="triangle"), 0, 0.75, 2.4, 3.9)
    assert center(up, "red")[1] < 0.42
    assert np.abs(turned.astype(int) - rest).sum() > 100_000
    assert center(small, "red")[2] < 0.5 * center(rest, "red")[2]


def test_clockwise_spin_is_clockwise():
    spin = event("spin", 0.0, 1.0, turn="clockwise")
    back = event("spin", 0.0, 1.0, turn="counterclockwise")
    first, other = (frames_at(make_script_of(HERE, turn, shape="triangle"), 0.3)[0] for turn in (spin, back))
    # A triangle on its base, turned a little clockwise, leans to the right: its tip is right of the center.
    tips = [np.nonzero((np.abs(f.astype(int) - INK["red"]).sum(-1) < 40).any(0))[0] for f in (first, other)]
    np.testing.assert_array_equal(first, other[:, ::-1])
    pose = pictures._pose(make_script_of(HERE, spin), 0, [HERE, spin], 0.3)
    assert pose.angle > 0
    assert len(tips[0])
    corner = np.array([np.sin(pose.angle), -np.cos(pose.angle)])  # where the tip has gone, y down
    x, y = (np.array([0.5, 0.5]) + 0.11 * corner) * 224
    assert np.abs(first[int(y), int(x)].astype(int) - INK["red"]).sum() < 60


def test_shapes_touch_in_the_middle_of_a_collision():
    there = event("present", 0.0, 4.0, actor=1, place="right")
    crash = event("collide", 1.0, 2.2, other=1, who="red square")
    before, touch, after = frames_at(make_script_of(HERE, there, crash), 0.9, 1.6, 2.3)
    gap = [center(f, "blue")[0] - center(f, "red")[0] for f in (before, touch, after)]
    assert gap[0] == pytest.approx(0.32, abs=0.01)
    assert gap[1] == pytest.approx(0.85 * (0.125 + 0.08), abs=0.02)
    assert gap[2] == pytest.approx(gap[0], abs=0.01)


def test_mouth_moves_while_a_shape_speaks():
    say = event("say", 1.0, 2.0, line="Look.", who="red square")
    frames = frames_at(make_script_of(HERE, say), 0.9, 1.12, 1.24, 2.1)
    dark = [(f.sum(-1) < 60)[100:140, 100:124].sum() for f in frames]
    assert dark[0] == dark[3] == 0
    assert min(dark[1:3]) > 20
    assert dark[1] != dark[2]


def test_camera_returns_after_its_move():
    for move in ("pan left", "pan right", "zoom in", "zoom out"):
        camera = event("camera", 1.0, 3.0, actor=-1, camera=move)
        rest, away, back = frames_at(make_script_of(HERE, camera), 0.5, 2.0, 3.2)
        np.testing.assert_array_equal(rest, back)
        (x, _, count), (x0, _, count0) = center(away, "red"), center(rest, "red")
        if "pan" in move:
            assert (x > x0 + 0.2) == (move == "pan left")
        else:
            assert (count > 1.5 * count0) == (move == "zoom in")


def test_letters_are_not_mirrored():
    assert bitmap("L").tolist() == [[True] + [False] * 4] * 6 + [[True] * 5]
    assert bitmap("SO").shape == (7, 11)


def test_rendered_text_is_legible():
    for word in WORDS:
        text = event("text", 1.0, 2.0, actor=-1, word=word, where="bottom")
        (frame,) = frames_at(make_script_of(text), 1.5)
        white = (frame[180:].min(-1) == 255).any(0)
        assert white[: 224 // 20].sum() == 0
        scale = round((frame[180:].min(-1) == 255).sum() / bitmap(word).sum()) ** 0.5
        assert scale >= 3


def test_scene_cut_happens_at_its_time():
    for index in range(20):
        script = make_script(0, index, "train", 3)
        for before, after in zip(script.scenes, script.scenes[1:], strict=False):
            first, second = frames_at(script, after.start - 0.01, after.start)
            assert np.abs(first[:3].astype(int).mean((0, 1)) - GROUND[before.backdrop]).max() < 45
            assert np.abs(second[:3].astype(int).mean((0, 1)) - GROUND[after.backdrop]).max() < 45

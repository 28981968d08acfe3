"""Several processes: the same curve, a lost one ends the others, the job goes on with the same or another number."""

import time

import pytest
from train_runs import kill

CLOSE = dict(rel=1e-4, abs=1e-6)


def same_curve(lines, others):
    for one, other in zip(lines, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], **CLOSE), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("8", "1", "1"), ("1", "4", "2")])
def test_four_processes_give_the_curve_of_one(runs, mesh):
    fields = [f"--mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)]
    name = f"four-{'-'.join(mesh)}"
    runs.finish(name, *fields, processes=4)
    same_curve(runs.lines(name), runs.lines("undisturbed"))


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_job_goes_on(runs):
    processes = runs.start("lost", processes=4)
    runs.until("lost", processes[0], 3)
    kill(processes[2])
    begun = time.monotonic()
    statuses = [process.wait(timeout=60) for process in processes]
    assert time.monotonic() - begun < 30
    assert all(statuses)
    runs.finish("lost", processes=2, devices=4)  # two hosts are left
    same_curve(runs.lines("lost"), runs.lines("undisturbed"))


@pytest.mark.slow
def test_one_process_of_two_is_asked_to_stop(runs):
    processes = runs.start("asked", processes=2)
    runs.until("asked", processes[0], 1)
    processes[1].terminate()
    assert [process.wait(timeout=120) for process in processes] == [75, 75]
    runs.finish("asked", processes=2)
    same_curve(runs.lines("asked"), runs.lines("undisturbed"))

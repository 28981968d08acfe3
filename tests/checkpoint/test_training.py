"""Training checkpoints: bit-identical between meshes, kills, full disks, buckets, several processes."""

import gc
import random
import resource
import signal
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import gcs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from google.api_core.exceptions import Forbidden, NotFound, ServiceUnavailable
from google.auth.exceptions import RefreshError, TransportError
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import run_connected, start

from avocado_jax.checkpoint.orbax import finished_steps
from avocado_jax.checkpoint.training import Checkpoints
from avocado_jax.data import storage
from avocado_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_test_mesh(*sizes):
    """A mesh of the first devices."""
    return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), AXES)


def make_state(step=0, rows=16):
    """Parameters and optimizer state as host arrays (float32, bfloat16, counters) that differ in every step."""
    rng = np.random.default_rng(step)
    params = {
        "text": {
            "layers": {
                "q": {"kernel": rng.standard_normal((3, rows, 8)).astype(np.float32)},
                "norm": {"scale": rng.standard_normal((3, 8)).astype(jnp.bfloat16)},
            },
        },
        "embedding": rng.standard_normal((64, rows)).astype(jnp.bfloat16),
    }
    moments = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), params)
    adam = optax.ScaleByAdamState(np.int32(step), moments, jax.tree.map(lambda x: x * 2, moments))
    return params, {"optimizer": (optax.EmptyState(), adam), "skipped": np.int32(3), "tokens": np.uint32(2**31 + step)}


def specs(tree):
    """Shard matrices over fsdp and tensor; replicate everything else."""
    spec = {3: PartitionSpec(None, "fsdp", "tensor"), 2: PartitionSpec(None, ("data", "fsdp", "tensor"))}
    return jax.tree.map(lambda leaf: spec[leaf.ndim] if leaf.ndim in spec else PartitionSpec(), tree)


def put_on_mesh(tree, mesh):
    """Put host arrays on a mesh."""
    put = lambda leaf, spec: jax.make_array_from_callback(  # noqa: E731
        np.shape(leaf), NamedSharding(mesh, spec), partial(lambda whole, where: np.asarray(whole)[where], leaf)
    )
    return jax.tree.map(put, tree, specs(tree))


def abstract_state(tree, mesh):
    """Shapes and shardings with which a tree is restored."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs(tree),
    )


def assert_trees_equal(ours, theirs):
    """Assert that two trees have equal structure, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x).reshape(-1).view(np.uint8), np.asarray(y).reshape(-1).view(np.uint8))


def save(checkpoints, step, mesh=None, **kwargs):
    """Save the values of a step."""
    params, rest = (put_on_mesh(tree, mesh or make_test_mesh(1, 4, 2)) for tree in make_state(step))
    checkpoints.save(step, params, rest, {"step": step, "digest": "d"}, **kwargs)


def restores(checkpoints, step, mesh=None):
    """Whether a step is restored bit-identically."""
    params, rest, position = checkpoints.restore(
        step, *(abstract_state(tree, mesh or make_test_mesh(1, 4, 2)) for tree in make_state(step))
    )
    assert_trees_equal((params, rest), make_state(step))
    assert position == {"step": step, "digest": "d"}
    return params, rest


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "run", keep=2)
    yield made
    made.close()


def test_restore_from_any_mesh_to_any_other(checkpoints):
    save(checkpoints, 3, make_test_mesh(8, 1, 1))
    checkpoints.wait()
    for sizes in ((1, 4, 2), (1, 1, 1), (2, 2, 2)):
        params, _ = restores(checkpoints, 3, make_test_mesh(*sizes))
        assert params["embedding"].sharding.mesh.shape == dict(zip(AXES, sizes))
    save(checkpoints, 4, make_test_mesh(1, 4, 2))
    checkpoints.wait()
    restores(checkpoints, 4, make_test_mesh(1, 1, 1))


def test_arrays_may_be_donated_during_a_save(checkpoints):
    """The next step runs in the same buffers during the save."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    params, rest = (put_on_mesh(tree, make_test_mesh(1, 4, 2)) for tree in make_state(1, rows=20_000))
    checkpoints.save(1, params, rest, {})
    for _ in range(3):
        params, rest = step(params), step(rest)
    jax.block_until_ready((params, rest))
    checkpoints.wait()
    params, rest, _ = checkpoints.restore(
        1, *(abstract_state(tree, make_test_mesh(1, 4, 2)) for tree in make_state(1, rows=20_000))
    )
    assert_trees_equal((params, rest), make_state(1, rows=20_000))


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    run = tmp_path / "run"
    for first in (1, 4):  # a run resumes from another process's checkpoints
        checkpoints = Checkpoints(run, keep=2)
        for step in range(first, first + 3):
            save(checkpoints, step, metric={1: 9.0, 2: 1.0, 3: 5.0, 4: None, 5: 1.5, 6: float("inf")}[step])
        checkpoints.close()
    assert finished_steps(run) == [2, 5, 6]
    assert checkpoints.latest() == 6
    restores(Checkpoints(run, keep=2), 2)


def test_saved_step_is_not_overwritten(checkpoints):
    save(checkpoints, 5)
    params, rest = (put_on_mesh(tree, make_test_mesh(1, 1, 1)) for tree in make_state(6))
    checkpoints.save(5, params, rest, {})
    checkpoints.wait()
    restores(checkpoints, 5)


def test_checkpoint_of_another_model_is_refused(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    params, rest = (abstract_state(tree, make_test_mesh(1, 4, 2)) for tree in make_state(1, rows=32))
    with pytest.raises(InputError, match=r"params/embedding is \[64, 16\], expected \[64, 32\]"):
        checkpoints.restore(1, params, rest)
    params, rest = (abstract_state(tree, make_test_mesh(1, 4, 2)) for tree in make_state(1))
    with pytest.raises(InputError, match="params/head is not stored"):
        checkpoints.restore(1, params | {"head": params["embedding"]}, rest)
    for path in Path(checkpoints.folder, "checkpoints/1/rest").rglob("d/*"):
        path.unlink()
    with pytest.raises(InputError, match="step 1 cannot be restored"):
        checkpoints.restore(1, params, rest)


def test_save_to_a_full_disk_keeps_earlier_checkpoints(tmp_path):
    """The next call reports the failed write in one line; earlier checkpoints are intact, later saves work."""
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    save(checkpoints, 1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for raising in (checkpoints.wait, partial(save, checkpoints, 3)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:  # noqa: PT012
                save(checkpoints, 2)
                raising()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert checkpoints.latest() == 1
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
        restores(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    assert finished_steps(tmp_path / "run") == [2]
    restores(Checkpoints(tmp_path / "run", keep=1), 2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_start_on_a_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
    """A save that cannot fit is not started; the error names the free space, and existing files stay."""
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    save(checkpoints, 1)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
        with pytest.raises(OSError, match="step 2 cannot be saved: the disk has 0 MB left"):
            save(checkpoints, 2)
    assert checkpoints.latest() == 1
    save(checkpoints, 2)
    checkpoints.close()
    assert finished_steps(tmp_path / "run") == [2]


NAMES = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import *
"""


def test_save_killed_at_any_moment_is_restorable(tmp_path):
    """SIGKILL during consecutive saves: the newest finished step is intact, and later saves work."""
    program = """
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    step = checkpoints.latest() or 0
    if step:
        restores(checkpoints, step)
    while True:
        step += 1
        save(checkpoints, step)
        print(step, flush=True)
    """
    run, moments = tmp_path / "run", random.Random(0)
    for _ in range(4):
        process = start(NAMES + textwrap.dedent(program), run)
        begun = [int(process.stdout.readline()) for _ in range(moments.randint(1, 4))][-1]
        time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = Checkpoints(run, keep=2)
        newest = checkpoints.latest() or 0
        assert newest >= begun - 1  # each save waits for the one before
        if newest:
            restores(checkpoints, newest)
        save(checkpoints, newest + 1)
        checkpoints.close()
        assert finished_steps(run)[-1] == newest + 1
        assert all(path.name.isdigit() for path in (run / "checkpoints").iterdir())


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    with gcs.proxied_bucket(tmp_path / "root", monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy):
    """A bucket of a real storage server."""
    return "gs://bucket"


def test_checkpoints_in_a_bucket(bucket, tmp_path):
    run = f"{bucket}/runs/a"
    checkpoints = Checkpoints(run, keep=1)
    assert checkpoints.latest() is None
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.wait()
    assert finished_steps(run) == [2]
    restores(checkpoints, 2, make_test_mesh(2, 2, 2))
    save(checkpoints, 3)
    checkpoints.close()
    # Buckets have no rename: a killed save has its final name, but no commit_success.txt.
    (tmp_path / "root" / "bucket" / "runs" / "a" / "checkpoints" / "3" / "commit_success.txt").unlink()
    assert finished_steps(run) == []
    checkpoints = Checkpoints(run, keep=1)
    assert checkpoints.latest() is None
    save(checkpoints, 3)
    checkpoints.wait()
    assert checkpoints.latest() == 3
    restores(checkpoints, 3)
    checkpoints.close()


BUCKETS_GET = "gs://bucket: no storage.buckets.get permission; grant roles/storage.legacyBucketReader beside"


def test_second_save_needs_bucket_metadata(proxy, bucket):
    """Orbax reads it when it deletes a step and when it opens a folder with steps; so does the start-up check."""
    proxy.denied = {"storage.buckets.get"}
    checkpoints = Checkpoints(f"{bucket}/run", keep=1)
    save(checkpoints, 1)
    checkpoints.wait()
    with pytest.raises(InputError, match=BUCKETS_GET) as error:  # noqa: PT012
        save(checkpoints, 2)
        checkpoints.wait()
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=BUCKETS_GET):
        Checkpoints(f"{bucket}/run", keep=1)


def test_failed_listing_is_not_an_empty_run(proxy, bucket, monkeypatch):
    """Otherwise a run would start again from step 0."""
    checkpoints = Checkpoints(f"{bucket}/listing", keep=1)  # gcsfs keeps listings of other tests' folders
    save(checkpoints, 1)
    checkpoints.wait()
    for permission in ("storage.objects.list", "storage.objects.get"):
        proxy.denied = {permission}
        with pytest.raises(InputError, match=f"gs://bucket: no {permission} permission; grant roles/storage.object"):
            checkpoints.latest()
    proxy.denied = set()
    proxy.faulty, proxy.every, proxy.faults = lambda method, path: True, 1, ("unavailable",)
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    with pytest.raises(OSError, match="503"):
        checkpoints.latest()
    proxy.faulty = lambda method, path: False
    assert checkpoints.latest() == 1


def test_storage_library_errors_become_storage_errors(monkeypatch):
    """Each is one line: an InputError if a retry cannot help, an OSError if it may."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # slow in a process with many modules
    monkeypatch.setattr(Checkpoints, "_manager", lambda self: None)
    checkpoints = Checkpoints("gs://b/run", keep=1)  # configures gcsfs, which may be imported later
    from gcsfs.retry import HttpError

    for error, kind, text in [
        (Forbidden("Permission 'storage.objects.create' denied"), InputError, "gs://b: no storage.objects.create"),
        (NotFound("no bucket"), InputError, "no such object or bucket"),
        (ServiceUnavailable("try later"), OSError, "try later"),
        (HttpError({"code": 503, "message": "backend"}), OSError, "backend"),
        (HttpError({"code": 401, "message": "Invalid Credentials"}), InputError, "no access"),
        (OSError("Forbidden: https://x\n'storage.objects.delete'"), InputError, "no storage.objects.delete"),
        (aiohttp.ClientPayloadError("cut off"), OSError, "cut off"),
        (ValueError("ABORTED: All 32 retry attempts failed: Service Unavailable"), OSError, "32 retry"),
        (ValueError("PERMISSION_DENIED: storage.objects.get"), InputError, "no storage.objects.get"),
        (RefreshError("revoked"), InputError, "no access"),
        (TransportError("metadata server"), OSError, "metadata server"),
    ]:

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(Checkpoints, "_manager", fails)
        monkeypatch.setattr(Checkpoints, "_differences", fails)
        for call in (
            partial(Checkpoints, "gs://b/run", keep=1),
            partial(checkpoints.save, 1, {}, {}, {}),
            partial(checkpoints.restore, 1, {}, {}),
        ):
            with pytest.raises(kind, match=text) as raised:
                call()
            assert "\n" not in str(raised.value)


def test_other_errors_of_a_save_are_raised_unchanged(monkeypatch):
    """A lost peer or a device without memory is not a storage fault: its status determines the restart."""
    monkeypatch.setattr(Checkpoints, "_manager", lambda self: None)
    checkpoints = Checkpoints("gs://b/run", keep=1)
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), TypeError("a bug")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(Checkpoints, "_manager", fails)
        with pytest.raises(type(error)):
            checkpoints.save(1, {}, {}, {})
    monkeypatch.setattr(Checkpoints, "_differences", lambda *_: checkpoints.save(1, {}, {}, {}))
    monkeypatch.setattr(Checkpoints, "_manager", lambda self: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("x")))
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(1, {}, {})


@pytest.mark.slow
def test_save_and_restore_with_several_processes(tmp_path):
    """Saved by two processes of two devices and restored by one of four, and vice versa."""
    write = """
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    save(checkpoints, int(sys.argv[2]), make_test_mesh(2, 2, 1))
    checkpoints.close()
    """
    read = """
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    step, mesh = int(sys.argv[2]), make_test_mesh(1, 2, 2)
    assert checkpoints.latest() == step
    params, rest, position = checkpoints.restore(step, *(abstract_state(tree, mesh) for tree in make_state(step)))
    for got, known in zip(jax.tree.leaves((params, rest)), jax.tree.leaves(make_state(step))):
        for shard in got.addressable_shards:
            assert_trees_equal(shard.data, np.asarray(known)[shard.index])
    checkpoints.close()
    """
    run_connected(NAMES + textwrap.dedent(write), 2, 2, tmp_path / "run", 1)
    run_connected(NAMES + textwrap.dedent(read), 1, 4, tmp_path / "run", 1)
    run_connected(NAMES + textwrap.dedent(write), 1, 4, tmp_path / "run", 2)
    run_connected(NAMES + textwrap.dedent(read), 2, 2, tmp_path / "run", 2)

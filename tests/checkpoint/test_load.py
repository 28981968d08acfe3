"""Loading onto a mesh, and run folders that start from a checkpoint, on disk and in a bucket."""

import dataclasses
import json
from functools import partial

import gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import merge
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from processes import run_connected
from reference import write_reference
from safetensors.numpy import load_file, save_file

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.convert import begin_run, from_hf, to_hf
from avocado_jax.checkpoint.load import load_params, load_sharded, open_checkpoint
from avocado_jax.checkpoint.training import Checkpoints
from avocado_jax.data import storage
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY, Lora
from avocado_jax.models.lora import add_adapters
from avocado_jax.models.thinker import init
from avocado_jax.parallel.rules import shardings


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A checkpoint in Hugging Face format with a tokenizer and one tensor that is not modelled."""
    folder = tmp_path_factory.mktemp("load") / "hf"
    write_reference(folder, TINY)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(hf):
    from_hf(hf, hf.parent / "run")
    return hf.parent / "run"


def make_test_mesh(*sizes):
    """A mesh of the first devices."""
    return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), ("data", "fsdp", "tensor"))


def abstract_params(mesh, config=TINY, dtype="float32"):
    """The stacked parameters as shapes with shardings."""
    tree = jax.eval_shape(partial(init, config), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where), tree, shardings(tree, mesh)
    )


def stacked(checkpoint):
    """The parameters as `load_params` reads them, stacked."""
    unrolled = load_params(checkpoint, "float32")
    for tower in ("audio", "vision", "text"):
        count = len([name for name in unrolled[tower] if name.startswith("layers_")])
        layers = [unrolled[tower].pop(f"layers_{i}") for i in range(count)]
        unrolled[tower]["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return unrolled


def assert_trees_equal(ours, theirs):
    """Assert that two trees have equal structure and values."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_load_onto_any_mesh(hf, run, sizes):
    for folder in (hf, run):
        checkpoint = open_checkpoint(folder)
        wanted = abstract_params(make_test_mesh(*sizes))
        params = load_sharded(checkpoint, wanted)
        assert_trees_equal(params, stacked(checkpoint))
        jax.tree.map(lambda leaf, shape: (leaf.sharding == shape.sharding) or pytest.fail("elsewhere"), params, wanted)
    # Replicated values are read once and shared between devices, so no device may write into them.
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    assert_trees_equal(doubled(params), jax.tree.map(lambda x: 2 * x, stacked(checkpoint)))


def test_load_with_other_dtypes_and_models(hf):
    checkpoint = open_checkpoint(hf)
    params = load_sharded(checkpoint, abstract_params(make_test_mesh(1, 2, 2), dtype="bfloat16"))
    assert_trees_equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stacked(checkpoint)))
    wanted = abstract_params(make_test_mesh(1, 1, 1))
    wanted.pop("head")
    with pytest.raises(InputError, match="another model, which differs in head"):
        load_sharded(checkpoint, wanted)


def test_each_process_reads_only_its_shards(hf, run, tmp_path, monkeypatch):
    """Two processes of two devices over fsdp: each reads the shards of its devices, and no tensor twice.

    The blocks of a process lie together in the run, not in the other folders. Of files in a bucket it requests no more
    bytes: columns are read as rows and exchanged between the processes.
    """
    program = """
    from functools import partial
    import numpy as np
    from jax.sharding import Mesh
    from avocado_jax.checkpoint.load import load_sharded, open_checkpoint
    from avocado_jax.models.config import TINY
    from avocado_jax.models.thinker import init
    from avocado_jax.parallel.rules import shardings
    from avocado_jax.data import storage
    tree = jax.eval_shape(partial(init, TINY), jax.random.key(0))
    struct = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    into, fetched = storage.read_into, []
    storage.read_into = lambda path, first, buffer: (fetched.append(len(buffer)), into(path, first, buffer))[1]
    for folder in sys.argv[1:4]:
        devices = np.array(jax.devices())[[0, 1, 2, 3] if folder.endswith("run") else [0, 2, 1, 3]]
        mesh = Mesh(devices.reshape(1, 4, 1), ("data", "fsdp", "tensor"))
        like = jax.tree.map(struct, tree, shardings(tree, mesh))
        checkpoint = open_checkpoint(folder)
        kind, sizes = type(checkpoint), []
        read = kind.read_part
        kind.read_part = lambda *of: (value := read(*of), sizes.append(value.size))[0]
        fetched.clear()
        params = load_sharded(checkpoint, like)
        if folder.startswith("gs://"):
            assert sum(fetched) == 4 * sum(sizes)
        kind.read_part = read
        leaves = jax.tree.leaves(params)
        held = sum(sum({str(part.index): part.data.size for part in x.addressable_shards}.values()) for x in leaves)
        assert sum(sizes) == held < 0.6 * sum(leaf.size for leaf in leaves)
        for entry in checkpoint.entries.values():
            value, leaf = checkpoint.read(entry), params
            for key in entry.path:
                leaf = leaf[key]
            for part in leaf.addressable_shards:
                mine = part.data if entry.layer is None else part.data[entry.layer]
                np.testing.assert_array_equal(mine, value[part.index[leaf.ndim - value.ndim :]])
    """
    with gcs.proxied_bucket(tmp_path / "buckets", monkeypatch):
        for path in hf.iterdir():
            storage.write(f"gs://bucket/hf/{path.name}", path.read_bytes())
        run_connected(program, 2, 2, hf, run, "gs://bucket/hf")


def test_storage_failure_is_not_reported_as_damage(run):
    """Tensorstore raises ValueError for both."""
    checkpoint = open_checkpoint(run)
    entry = next(iter(checkpoint.entries.values()))
    remote = checkpoint._replace(folder=epath.Path("gs://bucket/run"))
    for text, kind in (("UNAVAILABLE: 503", storage.StorageError), ("NOT_FOUND: chunk", InputError)):
        with pytest.raises(kind, match=text), remote.damage(entry):
            raise ValueError(text)


@pytest.fixture(scope="module")
def omni(hf):
    """A checkpoint with its prefix and a tensor that is not modelled."""
    folder = hf.parent / "omni"
    folder.mkdir()
    for path in hf.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {f"thinker.{name}": value for name, value in load_file(hf / "model.safetensors").items()}
    save_file(tensors | {"talker.weight": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def save_trained(folder, params, step=3):
    """Save a step of a training run."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(step, params, {"step": jnp.int32(step)}, {"plan": "p"})
    checkpoints.close()


@pytest.mark.parametrize("remote", [False, True])
def test_run_is_started_and_exported(omni, tmp_path, remote, monkeypatch):
    """From Hugging Face to a run, to a second run, and back: all untrained tensors are preserved."""
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    with gcs.storage_server(tmp_path / "root") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs.HOST}:{port}")
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{gcs.HOST}:{port}")
        base = "gs://bucket" if remote else str(tmp_path)
        first, second = f"{base}/first", f"{base}/second"
        wanted = abstract_params(make_test_mesh(1, 4, 2))
        begin_run(omni, first)
        begin_run(omni, first)  # repeated, as after a kill
        params = load_sharded(open_checkpoint(omni), wanted)
        save_trained(first, jax.tree.map(lambda leaf: leaf + 1, params))
        begin_run(first, second)
        save_trained(second, load_sharded(open_checkpoint(first), wanted))
        assert main(["convert", "to-hf", second, str(tmp_path / "back")]) == 0
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(omni / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        kept = name.startswith("talker.") or "audio_bos_eos" in name
        np.testing.assert_array_equal(ours[name], value if kept else value + 1)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (omni / name).read_bytes()


@pytest.mark.slow
def test_adapters_are_merged_on_load(hf, tmp_path):
    lora = Lora(rank=4, alpha=8.0)
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, lora=lora))
    wanted = abstract_params(make_test_mesh(1, 2, 2), config)
    begin_run(hf, tmp_path / "run", lora)
    assert json.loads((tmp_path / "run" / "lora.json").read_text()) == {"rank": 4, "alpha": 8.0}
    base = load_sharded(open_checkpoint(hf), wanted)
    params = add_adapters(base, wanted, seed=0)
    save_trained(tmp_path / "run", params, 1)
    assert_trees_equal(
        stacked(open_checkpoint(tmp_path / "run")), jax.tree.map(np.asarray, base)
    )  # fresh adapters are the identity
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    save_trained(tmp_path / "run", params, 2)
    plain = merge(params, 2.0)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, stacked(open_checkpoint(tmp_path / "run")), plain)
    jax.tree.map(
        close, load_sharded(open_checkpoint(tmp_path / "run"), abstract_params(make_test_mesh(1, 2, 2))), plain
    )
    assert to_hf(tmp_path / "run", tmp_path / "back").rounding < 1e-4  # fp32
    jax.tree.map(close, stacked(open_checkpoint(tmp_path / "back")), plain)


def test_merged_adapters_are_rounded_once_and_the_loss_is_reported(hf, tmp_path):
    """A bf16 base and an update that bf16 mostly rounds away."""
    lora = Lora(rank=4, alpha=8.0)
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, lora=lora))
    wanted = abstract_params(make_test_mesh(1, 2, 2), config)
    begin_run(hf, tmp_path / "run", lora)
    params = flatten_dict(add_adapters(load_sharded(open_checkpoint(hf), wanted), wanted, seed=0))
    for path, leaf in params.items():
        params[path] = leaf + 2e-4 if path[-1] == "lora_b" else leaf if "lora" in path[-1] else leaf.astype("bfloat16")
    save_trained(tmp_path / "run", unflatten_dict(params), 1)
    exact = to_hf(tmp_path / "run", tmp_path / "exact", dtype="float32")
    half = to_hf(tmp_path / "run", tmp_path / "half")
    assert (exact.step, half.step) == (1, 1)
    merged, rounded = (flatten_dict(stacked(open_checkpoint(tmp_path / name))) for name in ("exact", "half"))
    lost = total = 0.0
    for path in params:
        if path[-1] == "lora_a":
            kernel = *path[:-1], "kernel"
            update = 2.0 * np.asarray(params[path]) @ np.asarray(params[*path[:-1], "lora_b"])
            expected = np.float32(params[kernel]) + update
            np.testing.assert_allclose(merged[kernel], expected, rtol=1e-6, atol=1e-8)
            np.testing.assert_array_equal(rounded[kernel], expected.astype("bfloat16").astype(np.float32))
            lost, total = lost + np.sum((rounded[kernel] - expected) ** 2), total + np.sum(update**2)
    assert half.rounding == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert half.rounding > 0.3
    assert exact.rounding < 1e-3

"""Communication of programs that were compiled for CPUs and for a TPU slice."""

import os
import subprocess
import sys

from avocado_jax.planning.collectives import collective_bytes

LAYERS, ROWS, WIDTH = 5, 16, 256

PROGRAM = f"""
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.planning.program import devices_of

devices = devices_of(sys.argv[1] or None)[:4]
mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Auto,))
divided = NamedSharding(mesh, P(None, None, "fsdp"))
weights = jax.ShapeDtypeStruct(({LAYERS}, {WIDTH}, {WIDTH}), jnp.float32, sharding=divided)
x = jax.ShapeDtypeStruct(({ROWS}, {WIDTH}), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

def run(weights, x):
    # Each layer's rows stay where they are, so its weights must come to them.
    layer = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("fsdp"))), None)
    return jax.lax.scan(layer, x, weights)[0].sum()

print(collective_bytes(jax.jit(run).lower(weights, x).compile().as_text()))
"""


def compiled(topology):
    """Bytes that a program for the given devices sends, measured in a new process."""
    flags = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology], env=flags, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1])


def test_collectives_in_a_loop_count_per_iteration():
    gathered = LAYERS * WIDTH * WIDTH * 4 * 3 / 4  # a device sends its quarter of the weights to three others
    nothing = {"reduce-scatter": 0.0, "all-to-all": 0.0, "collective-permute": 0.0}
    total = {"all-reduce": 2 * 4 * 3 / 4}  # the sum
    assert compiled("") == {"all-gather": gathered, **total, **nothing}
    # A TPU multiplies in bfloat16 by default, and gathers the operands in that type.
    assert compiled("v5e:2x2") == {"all-gather": gathered / 2, **total, **nothing}


STARTED = """
HloModule step

%gather (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %g = bf16[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.3 (x: f32[32,128]) -> f32[8,128] {
  %x = f32[32,128]{1,0} parameter(0)
  %all = f32[32,128]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = f32[8,128]{1,0} dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: bf16[8,128], b: f32[32,128]) -> f32[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[32,128]{1,0} parameter(1)
  %start = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}) async-start(%a), calls=%gather
  %going = bf16[32,128]{1,0} fusion(%start), kind=kCustom, calls=%gather
  %done = bf16[32,128]{1,0} async-done(%start), calls=%gather
  %moved-start = (bf16[32,128]{1,0}, bf16[32,128]{1,0}, u32[], u32[]) collective-permute-start(%done), channel_id=3
  %moved = bf16[32,128]{1,0} collective-permute-done(%moved-start)
  %both-start = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%c), channel_id=4, replica_groups=[2,4]<=[8]
  ROOT %sum = f32[8,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_asynchronous_collectives_count_once():
    """Asynchronous collectives occur in several instructions; a reduce-scatter sends half as much as an all-reduce."""
    assert collective_bytes(STARTED) == {
        "all-gather": 32 * 128 * (2 + 4) * 3 / 4,
        "reduce-scatter": 32 * 128 * 4 * 3 / 4,
        "all-reduce": 0.0,
        "all-to-all": 0.0,
        "collective-permute": 32 * 128 * 2.0,
    }


DECODING = """
HloModule decoding

%token (x: f32[32,128]) -> f32[32,128] {
  %x = f32[32,128]{1,0} parameter(0)
  ROOT %sum = f32[32,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

%going (x: f32[32,128]) -> pred[] {
  %x = f32[32,128]{1,0} parameter(0)
  %length = s32[] constant(4096)
  %early = pred[] compare(%step, %length), direction=LT
  ROOT %both = pred[] and(%early, %unfinished)
}

ENTRY %main (a: f32[32,128]) -> f32[32,128] {
  %a = f32[32,128]{1,0} parameter(0)
  ROOT %done = f32[32,128]{1,0} while(%a), condition=%going, body=%token
}
"""


def test_data_dependent_loops_count_their_maximum():
    assert collective_bytes(DECODING, 4096)["all-reduce"] == 4096 * collective_bytes(DECODING)["all-reduce"] > 0

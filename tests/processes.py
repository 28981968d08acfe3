"""Start jax processes on this machine: one with another number of devices, or several connected ones."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path


def start(program, *arguments, devices=8, optimization=1):
    """Start a Python program that can import the tests' helpers, on simulated devices.

    Args:
        optimization: level of the compiler; 0 compiles fastest.
    """
    program = f"import sys\nsys.path[:0] = {[str(Path(__file__).parent)]!r}\n" + textwrap.dedent(program)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level={optimization}"
    flags += " --xla_cpu_use_fusion_emitters=false"  # as in conftest.py
    if optimization == 0:
        flags += " --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_connected(program, count, devices, *arguments, timeout=120, **options):
    """Run a program in `count` connected processes of `devices` devices each. Returns their outputs."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    connect = f"""
    import sys, jax
    if {count} > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize({address!r}, {count}, int(sys.argv[-1]))
    """
    program = textwrap.dedent(connect) + textwrap.dedent(program)
    processes = [start(program, *arguments, number, devices=devices, **options) for number in range(count)]
    outputs = []
    for process in processes:
        output, complained = process.communicate(timeout=timeout)
        assert process.returncode == 0, complained
        outputs.append(output)
    return outputs

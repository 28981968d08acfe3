# Sourced by worker.sh on every host of a slice: what jax and libtpu are told, each with its reason.
# shellcheck shell=bash

# Google opens 8476 between the hosts of a slice; jax has asked for 8482 since 0.8.1, and hangs where that is closed
# (jax-ml/jax#35905).
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT-8476}

# A start after a failure finds its programs compiled: the 7B step takes minutes. On the host's own disk; a run may
# name a bucket instead.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-/tmp/avocado-compiled}

# Without it every operation of gcsfs first waits 12 to 90 s on a probe of the bucket's kind.
export GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=${GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT-false}

# A host that hangs has then told the log all it had to say.
export PYTHONUNBUFFERED=1

# Input workers are processes of their own: threads of BLAS in each of them would fight for the cores.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS-1} OMP_NUM_THREADS=${OMP_NUM_THREADS-1}

# Several slices: gradients cross the data-center network in the shadow of other work. The first lets the compiler
# treat them so, the second pipelines those of unequal sizes over iterations (MaxText's data-parallel flags). Inside a
# slice libtpu's own choices stand: the table in README.md was compiled with them.
if [[ ${MEGASCALE_NUM_SLICES-1} != 1 ]]; then
  LIBTPU_INIT_ARGS+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
  LIBTPU_INIT_ARGS+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
  export LIBTPU_INIT_ARGS
fi

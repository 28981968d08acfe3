# Sourced by worker.sh on every host of a slice: environment variables of jax and libtpu, each with its reason.
# shellcheck shell=bash

# Google opens port 8476 between the hosts of a slice; jax defaults to 8482 since 0.8.1 and hangs where that is closed
# (jax-ml/jax#35905).
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT-8476}

# Without it every operation of gcsfs first waits 12 to 90 s for a probe of the bucket's type.
export GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=${GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT-false}

# The log of a host that hangs is complete.
export PYTHONUNBUFFERED=1

# Input workers are processes: BLAS threads in each of them would compete for the cores.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS-1} OMP_NUM_THREADS=${OMP_NUM_THREADS-1}

# With several slices, gradients cross the data-center network. The first flag overlaps them with computation, the second
# pipelines those of unequal sizes over iterations (MaxText's data-parallel flags).
#
# Within a slice libtpu's defaults apply, and the table in README.md was compiled with them. Of the flags that are often
# set there, xla_enable_async_all_gather, xla_tpu_enable_async_collective_fusion_fuse_all_gather (each on v6e and v5p) and
# xla_tpu_prefer_async_allgather_to_allreduce (on v5p) leave the compiled gradient of an FSDP stack unchanged to the
# letter with libtpu 0.0.52, and the first two together with a larger xla_tpu_scoped_vmem_limit_kib are refused on v6e.
if [[ " $* " =~ " "--mesh\.slices[=\ ]([2-9]|[1-9][0-9]) ]]; then
  LIBTPU_INIT_ARGS+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
  LIBTPU_INIT_ARGS+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
  export LIBTPU_INIT_ARGS
fi

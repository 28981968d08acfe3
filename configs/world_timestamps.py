"""The shipped captioner taught to begin each sentence with its time, too briefly to be exact: for GRPO to mend.

  avocado sft configs/world_timestamps.py --workdir runs/world_timestamps

A caption names the times of its events as "[1.2 - 2.27]", in seconds.

Expected: held-out loss 0.445; time IoU of greedy captions of 64 held-out clips 0.605.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="avocado_jax/assets/captioner",
    steps=240,
    batch=16,
    train="captioner",
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:5:3840:timestamps", heldout="world:0:test:1:64:timestamps", caption_tokens=400, shapes=2
    ),
    optim=OptimConfig(lr=1e-3, warmup=0.05, weight_decay=0.05),
    checkpoint_every=120,
    eval_every=120,
    eval_rows=16,
    samples=0,
)

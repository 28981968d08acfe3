"""The shipped captioner with bad habits: it leaves things out and falls into loops (world/habits.py), for GRPO to mend.

  avocado sft configs/world_habits.py --workdir runs/world_habits

Expected: TODO
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
        train="world:0:train:5:3840:habits", heldout="world:0:test:1:64:habits", caption_tokens=208, shapes=2
    ),
    optim=OptimConfig(lr=1e-3, warmup=0.05, weight_decay=0.05),
    checkpoint_every=120,
    eval_every=120,
    eval_rows=64,
    samples=8,
    sample_tokens=208,
)

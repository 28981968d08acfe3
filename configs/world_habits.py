"""The shipped captioner with bad habits: it leaves things out and falls into loops (world/habits.py), for GRPO to mend.

  avocado sft configs/world_habits.py --workdir runs/world_habits

Expected: greedy captions of unseen clips fall from dialogue F1 0.96 to 0.56 and from event recall 0.81 to 0.64; 5 to 6
minutes on two cores.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="avocado_jax/assets/captioner",
    steps=160,
    batch=16,
    train="captioner",
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:5:2560:habits", heldout="world:0:test:1:64:habits", caption_tokens=208, shapes=2
    ),
    optim=OptimConfig(lr=5e-4, warmup=0.05, weight_decay=0.05),
    checkpoint_every=80,
    eval_every=80,
    eval_rows=16,
    samples=0,
)

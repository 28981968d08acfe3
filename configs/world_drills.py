"""The AVWorld captioner from nothing, first half: drills, the parts of a clip practised apart (world/drills.py).

  python launch/small_checkpoint.py runs/small
  avocado sft configs/world_drills.py --workdir runs/world_drills
  avocado sft configs/world_small.py --workdir runs/world_small

Expected: not reached yet what it is for; see the README, "Limits".
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="runs/small",
    steps=1200,
    batch=32,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:1:38400:drills", heldout="world:0:test:1:64:drills", caption_tokens=128, shapes=4
    ),
    optim=OptimConfig(lr=2e-3, warmup=0.04, final=0.2, weight_decay=0.05),
    checkpoint_every=100,
    eval_every=200,
    eval_rows=64,
    samples=8,
    sample_tokens=128,
)

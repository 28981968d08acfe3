"""Random weights of the tiny size on AVWorld: shows in minutes that training works; captions stay meaningless.

  python launch/random_checkpoint.py runs/tiny --size tiny
  avocado sft configs/world_tiny.py --workdir runs/world_tiny

Expected: the loss falls from 6.2 to below 4 (nats a byte) in 40 steps.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="runs/tiny",
    steps=40,
    batch=8,
    train="all",
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    data=DataConfig(train="world:0:train:0:64", heldout="world:0:test:0:16", caption_tokens=512, shapes=2),
    optim=OptimConfig(lr=3e-3),
    checkpoint_every=20,
    eval_every=20,
    eval_rows=16,
)

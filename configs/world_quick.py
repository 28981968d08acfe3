"""A small model from random weights on a few hundred AVWorld clips: the whole road, and the start of learning.

  avocado world runs/quickstart/train --clips 320 --seed 0 --level 0 --references 0
  avocado prepare runs/quickstart/train/clips.jsonl runs/quickstart/shards --features --reading fewest_pixels=784
  python launch/small_checkpoint.py runs/quickstart/start
  avocado sft configs/world_quick.py --workdir runs/quickstart/run

Expected: the loss falls from 7.2 to about 0.6 (nats a token); see the README, "Measured". launch/quickstart.sh runs it.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="runs/quickstart/start",
    steps=240,
    batch=8,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(train="runs/quickstart/shards", caption_tokens=128, shapes=2),
    optim=OptimConfig(lr=2e-3, warmup=0.1, weight_decay=0.05),
    checkpoint_every=60,
)

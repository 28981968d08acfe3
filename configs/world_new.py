"""The shipped captioner goes on learning, in a harder world: more colours, shapes, voices and lines, patterned grounds.

  avocado world runs/new/train --clips 300 --seed 7 --level 1 --references 0
  avocado world runs/new/test --clips 24 --seed 7 --level 1 --references 0 --split test
  avocado prepare runs/new/train/clips.jsonl runs/new/shards --features --reading fewest_pixels=784
  avocado sft configs/world_new.py --workdir runs/world_new

Expected: see the README, "Measured". launch/quickstart.sh runs it.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="avocado_jax/assets/captioner",
    epochs=3.0,
    batch=8,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(train="runs/new/shards", caption_tokens=160, shapes=3),
    optim=OptimConfig(lr=1e-3, warmup=0.1, weight_decay=0.05),
    checkpoint_every=50,
)

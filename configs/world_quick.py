"""The shipped captioner on a world it has not seen: more colours, shapes, voices, words. launch/quickstart.sh runs it.

  avocado world runs/quickstart/train --clips 320 --seed 0 --level 1 --references 0
  avocado prepare runs/quickstart/train/clips.jsonl runs/quickstart/shards --features --checkpoint CAPTIONER
  avocado sft configs/world_quick.py --workdir runs/quickstart/run

CAPTIONER is avocado_jax/assets/captioner, whose way of sampling clips the shards must have.

Expected: see the README, "Two commands".
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="avocado_jax/assets/captioner",
    steps=160,
    batch=8,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(train="runs/quickstart/shards", caption_tokens=160, shapes=2),
    optim=OptimConfig(lr=1e-3, warmup=0.1, weight_decay=0.05),
    checkpoint_every=40,
)

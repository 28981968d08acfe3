"""The AVWorld captioner from nothing, second half: whole clips.

  python launch/small_checkpoint.py runs/small
  avocado sft configs/world_drills.py --workdir runs/world_drills
  avocado sft configs/world_small.py --workdir runs/world_small

Expected: not reached yet what it is for; see the README, "Limits".
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="runs/world_drills",
    epochs=1.0,
    batch=16,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:2:16000:plain", heldout="world:0:test:1:64:plain", caption_tokens=128, shapes=4
    ),
    optim=OptimConfig(lr=1.5e-3, warmup=0.03, weight_decay=0.05),
    checkpoint_every=100,
    eval_every=200,
    eval_rows=64,
    samples=8,
    sample_tokens=128,
)

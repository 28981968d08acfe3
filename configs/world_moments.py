"""The AVWorld captioner from nothing, first half: short pieces of clips, in which each word hangs on what is there.

  python launch/small_checkpoint.py runs/small
  avocado sft configs/world_moments.py --workdir runs/world_moments
  avocado sft configs/world_small.py --workdir runs/world_small

Expected: see configs/world_small.py.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="runs/small",
    epochs=1.0,
    batch=16,
    train="all",
    dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:1:32000:moments", heldout="world:0:test:1:64:moments", caption_tokens=96, shapes=4
    ),
    optim=OptimConfig(lr=2e-3, warmup=0.03, final=0.3, weight_decay=0.05),
    checkpoint_every=200,
    eval_every=200,
    eval_rows=64,
    samples=8,
    sample_tokens=64,
)

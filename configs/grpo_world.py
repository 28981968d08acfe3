"""GRPO of the AVWorld captioner, on a laptop: the paper's second stage where the truth is known.

  avocado grpo configs/grpo_world.py --workdir runs/grpo_world

References have 65 tokens (median): R_L falls from 1.5 to 3 times that, and captions may be a little longer still.

Expected: R_C and R_D begin near 0.96 and 0.91 and have little left to gain, 4 to 5 s a step on two cores once compiled:
it shows that the stage runs, not yet what it is worth; see the README, "Limits".
"""

from avocado_jax.config import DataConfig, GrpoConfig, ObjectiveConfig, OptimConfig, RewardConfig, SamplingConfig

config = GrpoConfig(
    init="avocado_jax/assets/captioner",
    steps=200,
    batch=8,
    group=8,
    train="captioner",
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:7:1600:plain", heldout="world:0:test:1:64:plain", caption_tokens=128, shapes=1
    ),
    sampling=SamplingConfig(tokens=208, temperature=1.0),
    rewards=RewardConfig(low=98, high=195, covered_low=0.95, covered_high=1.0, keypoints=16, lines=4),
    objective=ObjectiveConfig(beta=0.04),
    optim=OptimConfig(lr=1e-4, warmup=0.05, final=0.1),
    checkpoint_every=25,
    eval_every=50,
    eval_rows=64,
)

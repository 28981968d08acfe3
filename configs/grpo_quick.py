"""GRPO behind the fine-tuning of world_quick.py, on the same shards. launch/quickstart.sh runs it.

  avocado grpo configs/grpo_quick.py --workdir runs/quickstart/grpo

Expected: see the README, "Measured".
"""

from avocado_jax.config import DataConfig, GrpoConfig, ObjectiveConfig, OptimConfig, RewardConfig, SamplingConfig

config = GrpoConfig(
    init="runs/quickstart/run",
    steps=24,
    batch=8,
    group=8,
    train="captioner",
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    data=DataConfig(train="runs/quickstart/shards", caption_tokens=160, shapes=1),
    sampling=SamplingConfig(tokens=224, temperature=1.0),
    rewards=RewardConfig(low=144, high=224, covered_low=0.8, covered_high=1.0, keypoints=24, lines=4),
    objective=ObjectiveConfig(beta=0.04),
    optim=OptimConfig(lr=3e-4, warmup=0.05, final=0.1),
    checkpoint_every=8,
)

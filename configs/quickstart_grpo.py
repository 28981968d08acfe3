"""The captioner with bad habits, mended by rewards alone, in two minutes: the GRPO of launch/quickstart.sh.

  avocado grpo configs/quickstart_grpo.py --workdir runs/quickstart/quick_grpo

References have 63 tokens (median) and 86 at most. No reference caption is learned from, and those of the training clips
have the same habits; keypoints and dialogues are complete.

Expected: see the README, "Two commands".
"""

from avocado_jax.config import DataConfig, GrpoConfig, ObjectiveConfig, OptimConfig, RewardConfig, SamplingConfig

config = GrpoConfig(
    init="avocado_jax/assets/captioner_habits",
    steps=24,
    batch=4,
    group=8,
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    data=DataConfig(train="world:0:train:7:96:habits", caption_tokens=112, shapes=1),
    sampling=SamplingConfig(tokens=112),
    rewards=RewardConfig(low=90, high=112, covered_low=0.95, covered_high=1.0, keypoints=16, lines=4),
    objective=ObjectiveConfig(advantage="mean", beta=0.0),
    optim=OptimConfig(lr=3e-4, warmup=0.05, final=0.1),
    checkpoint_every=12,
)

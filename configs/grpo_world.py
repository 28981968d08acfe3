"""GRPO of an AVWorld captioner with bad habits, on a laptop: the paper's second stage where the truth is known.

  avocado sft configs/world_habits.py --workdir runs/world_habits
  avocado grpo configs/grpo_world.py --workdir runs/grpo_world
  avocado ablate configs/grpo_world.py --out runs/ablation        # what each reward term is worth

References have 65 tokens (median): R_L falls from 1.5 to 3 times that, and captions may be a little longer still. A
keypoint of this world has few words and each of them counts, so the lexical judge requires all of them. The captions
of the clips have the same faults as before, so that fine-tuning on them does not mend these; keypoints and dialogues
are complete.

Expected: see avocado_jax/eval/README.md, "Measured".
"""

from avocado_jax.config import DataConfig, GrpoConfig, ObjectiveConfig, OptimConfig, RewardConfig, SamplingConfig

config = GrpoConfig(
    init="runs/world_habits",
    steps=30,
    batch=8,
    group=8,
    train="captioner",
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    data=DataConfig(
        train="world:0:train:7:1600:habits", heldout="world:0:test:1:200:plain", caption_tokens=128, shapes=1
    ),
    sampling=SamplingConfig(tokens=208, temperature=1.0),
    rewards=RewardConfig(low=98, high=195, covered_low=0.95, covered_high=1.0, keypoints=16, lines=4),
    objective=ObjectiveConfig(beta=0.04),
    optim=OptimConfig(lr=3e-4, warmup=0.05, final=0.1),
    checkpoint_every=15,
    eval_every=15,
    eval_rows=16,
)

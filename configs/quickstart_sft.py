"""The captioner with bad habits on captions without them, in a minute: the fine-tuning of launch/quickstart.sh.

  avocado sft configs/quickstart_sft.py --workdir runs/quickstart/quick_sft

Expected: see the README, "Two commands".
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init="avocado_jax/assets/captioner_habits",
    steps=30,
    batch=8,
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    data=DataConfig(train="world:0:train:5:240:plain", caption_tokens=112, shapes=1),
    optim=OptimConfig(lr=5e-4, warmup=0.1, weight_decay=0.05),
    checkpoint_every=15,
)

"""As sft_7b.py, for Qwen2.5-Omni-3B.

avocado sft configs/sft_3b.py --workdir runs/sft_3b --init CHECKPOINT --data.train SHARDS --accumulate 128

Expected: no published result at this size; not run here.
"""

from avocado_jax.config import DataConfig, NominalConfig, OptimConfig, SftConfig

config = SftConfig(
    epochs=2.0,
    batch=128,
    train="captioner",
    remat="full",
    data=DataConfig(caption_tokens=4096),
    optim=OptimConfig(lr=2e-5, warmup=0.05, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
    nominal=NominalConfig(model="3b", clip=(28032, 99, 30, 50)),
)

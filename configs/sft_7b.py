"""AVoCaDO's supervised fine-tuning of Qwen2.5-Omni-7B: encoders frozen, adapters and language model trained.

  avocado sft configs/sft_7b.py --workdir gs://BUCKET/sft_7b --init CHECKPOINT --data.train gs://BUCKET/shards

2 epochs of 107 thousand captions in batches of 128, lr 2e-5, 2 frames a second, clips of up to 100 s. Warm-up, decay
and clipping, which the paper leaves open, are those of the closest published recipe. launch/README.md has the
further options of each slice (`--accumulate`, `--remat`, `--mesh.tensor`); `avocado plan configs/sft_7b.py
--topology v5p:4x4x4` finds it for another. On v5p, `--remat dots --mesh.tensor 2 --accumulate 4` is predicted to be 15%
faster than the default "full", which also fits v6e (avocado_jax/planning/README.md).

Expected: the paper's row after SFT: video-SALMONN-2 total 41.4, Daily-Omni 48.1 (not run here).
"""

from avocado_jax.config import DataConfig, NominalConfig, OptimConfig, SftConfig

config = SftConfig(
    epochs=2.0,
    batch=128,
    train="captioner",
    remat="full",
    data=DataConfig(caption_tokens=4096),  # captions of the paper's set are rarely longer than 3,982
    checkpoint_minutes=20,  # what a lost host costs at most
    optim=OptimConfig(lr=2e-5, warmup=0.05, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
    nominal=NominalConfig(model="7b", clip=(28032, 99, 30, 50)),  # 99 s; of eight shapes for clips of 4-100 s
)

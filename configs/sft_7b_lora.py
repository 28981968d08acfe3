"""Low-rank adapters of the language model, and the two modality adapters, of Qwen2.5-Omni-7B: fits one 80 GB card.

  avocado sft configs/sft_7b_lora.py --workdir RUN --init CHECKPOINT --data.train SHARDS
  avocado convert to-hf RUN OUT          # the adapters are merged

Expected: what `avocado plan configs/sft_7b_lora.py --topology v6e:4x4` says; not run on real weights yet.
"""

from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    train="lora",
    batch=16,
    data=DataConfig(caption_tokens=1024, shapes=16, workers=4),
    checkpoint_minutes=20,  # what a lost host costs at most
    optim=OptimConfig(lr=1e-4),
)

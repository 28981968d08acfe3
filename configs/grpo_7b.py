"""AVoCaDO's GRPO of Qwen2.5-Omni-7B after its fine-tuning: R = R_C + R_D + R_L on 2 thousand samples of the same set.

  avocado grpo configs/grpo_7b.py --workdir gs://BUCKET/grpo_7b --init CHECKPOINT --data.train gs://BUCKET/shards

One epoch, 8 captions of each of 8 clips a step at temperature 1, beta 0.04, lr 1e-5. What the paper leaves open (the
bounds of the ratio, warm-up, decay, clipping of the gradient) is that of the closest published recipe. The estimate of
the KL and the aggregation are GRPO's own. Captions may be as long as R_L looks at.

The captions of four batches are sampled together, since a decoding step reads all weights: updates 2 to 4 of each
rollout are corrected for the change of the policy (train/README.md has what this changes on AVWorld). The paper does
not say how many updates it makes per rollout: `--rollout_batches 1` for one. `--rollout_int8 true` halves the weights.

Judge: the config keeps `lexical`, which needs no model and measures wording (rewards/README.md). For real data use the
paper's kind of judge, `--rewards.judge remote --rewards.judge_url URL --rewards.judge_model NAME`, or the initial
policy, `--rewards.judge lm --rewards.judge_model CHECKPOINT`. Neither has been measured on published weights; measure
with `python tests/measure_judges.py FILE --judge lm --judge-model CHECKPOINT` before a run. With `lexical`, take the
word weights from the training captions: `--rewards.idf MANIFEST`. The thresholds were chosen on 20 paraphrases: with
these and `idf`, captions in other words earn 0.66 and captions of other clips 0.03 (rewards/README.md).

The mesh is for 64 chips: each stores a quarter of the weights for decoding, and in updates a clip's captions are two
rows, a row for every four chips (more chips: `--split 4`). launch/README.md has memory and time of this and of smaller
slices, which take fewer chip-seconds; `avocado plan configs/grpo_7b.py --topology SLICE,SLICE --search 0` ranks them.

Expected: the paper's last row: video-SALMONN-2 total 37.3, Daily-Omni 50.1, RepCol 0.4 and 1.0 (not run here).
"""

from avocado_jax.config import (
    DataConfig,
    GrpoConfig,
    MeshConfig,
    NominalConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
)

config = GrpoConfig(
    epochs=1.0,
    batch=8,
    group=8,
    split=2,
    mesh=MeshConfig(tensor=4),
    train="captioner",
    remat="full",
    data=DataConfig(caption_tokens=4096, shapes=4),  # each shape has six programs to compile (launch/README.md)
    sampling=SamplingConfig(tokens=4096, temperature=1.0),
    rewards=RewardConfig(
        checklist=1.0, dialogue=1.0, length=1.0, low=2048, high=4096, covered_low=0.3, covered_high=0.45
    ),
    rollout_batches=4,
    objective=ObjectiveConfig(
        beta=0.04, clip_low=0.2, clip_high=0.2, kl="k3", aggregate="sequence", importance_cap=2.0
    ),
    checkpoint_minutes=20,  # what a lost host costs at most
    optim=OptimConfig(lr=1e-5, warmup=0.05, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
    nominal=NominalConfig(model="7b", clip=(28032, 99, 30, 50)),
)

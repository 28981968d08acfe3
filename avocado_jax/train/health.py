"""Messages of a GRPO run: a description of its steps at the start, and warnings when captions collapse.

The messages do not influence the run.
"""

import sys
from collections.abc import Mapping

import jax

from avocado_jax.config import GrpoConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.flops import grpo_flops
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import weight_of

# Limit of `sampler_gap` in nats per token. Rounding in bf16 gives 0.01 to 0.03 for random weights with logits of order
# 1 (tests/train/test_sampler.py). Above the limit, the sampler differs from the trained policy, which biases the
# gradient.
SAMPLER_GAP = 0.05
SHORTER, CALMER = 4, 5  # maximum factors by which length and entropy may fall below those of this process's first step
MISSING = {  # term -> the missing value and the reason, for messages
    "checklist": "R_C: no keypoints, or no answer",
    "probes": "score of probes: no probes, or no answer",
    "timing": "time IoU: no events with times",
}
LOOPING, TRUNCATED, FLAT, UNKNOWN = 0.1, 0.5, 0.8, 0.5  # shares


def describe(config: GrpoConfig, model: ThinkerConfig, bucket: Bucket) -> str:
    """Describe the sampling, cost and reward of a step.

    Args:
        bucket: the largest shape of the run.
    """
    sampling, updates = config.sampling, config.passes * config.minibatches
    row = grpo_flops(
        model, bucket.shape, config.group, sampling.tokens, config.train, updates, config.objective.beta > 0
    )
    lines = [
        f"step: {config.group} captions of each of {config.batch} clips, up to {sampling.tokens} tokens at temperature "
        f"{sampling.temperature:g}; at most {config.batch * sum(row) / 1e15:.3g} PFLOP"
    ]
    if config.oversample:
        lines.append(
            f"spare clips: {config.oversample} for the {config.rollout_batches * config.batch} of a rollout; groups of "
            "equal rewards never reach an update"
        )
    weights = {name: getattr(config.rewards, name) for name in TERMS} | dict(map(weight_of, config.rewards.extra))
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items() if weight)
    judge = f", keypoints judged by {config.rewards.judge}" if config.rewards.checklist else ""
    judge += f", probes answered by {config.rewards.probe_judge}" if config.rewards.probes else ""
    lines.append(f"reward: {terms or 'no term has a weight'}{judge}")
    if updates == 1 and config.objective.aggregate == "sequence":
        first = "the first update of each rollout" if config.rollout_batches > 1 else "every update"
        lines.append(
            f"loss: the policy loss of {first} is 0 up to rounding, since the advantages of a group sum to 0; its "
            "gradient is not. Follow reward, heldout_reward and kl"
        )
    return "\n".join(lines)


class Health:
    """Prints warnings about the metrics of a run on process 0, each when its condition becomes true."""

    def __init__(self) -> None:
        self._first: Mapping[str, float] | None = None
        self._holding: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float], stale: bool = False) -> None:
        """Print the new warnings.

        Args:
            step: finished steps.
            stale: the captions were sampled from an earlier policy, so `sampler_gap` includes the updates since.
        """
        if not metrics.get("rows", 1) or metrics.get("all_equal"):  # a step without update
            return
        self._first = self._first or metrics
        found = warnings(metrics, self._first)
        unknown = {"sampler_gap"} if stale else set()
        for name in found.keys() - self._holding - unknown:
            if jax.process_index() == 0:
                print(f"step {step}: warning: {found[name]}", file=sys.stderr)
        self._holding = (found.keys() - unknown) | (self._holding & unknown)


def warnings(metrics: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """The messages of all true conditions, by name. Missing and NaN metrics cause no warning.

    Args:
        first: metrics to compare with.
    """

    def below(name: str, factor: float) -> bool:
        return metrics.get(name, float("nan")) < first.get(name, float("nan")) / factor

    def above(name: str, limit: float) -> bool:
        return metrics.get(name, float("nan")) > limit

    found = {}
    if above("sampler_gap", SAMPLER_GAP):
        found["sampler_gap"] = (
            f"sampler_gap {metrics['sampler_gap']:.3f} is above {SAMPLER_GAP}: rollouts are off-policy"
        )
    if below("length", SHORTER):
        found["length"] = f"captions have {metrics['length']:.0f} tokens, {first['length']:.0f} at the start"
    if below("entropy", CALMER):
        found["entropy"] = (
            f"entropy is {metrics['entropy']:.3f} nats per token, {first['entropy']:.3f} at the start: captions of a "
            "group become the same"
        )
    if metrics.get("reward_repetition", 0) < -LOOPING:
        found["repetition"] = f"{-metrics['reward_repetition']:.0%} of captions repeat themselves (RepCol)"
    if above("truncated", TRUNCATED):
        found["truncated"] = f"{metrics['truncated']:.0%} of captions reach sampling.tokens without an end"
    if above("zero_variance", FLAT):
        found["zero_variance"] = f"{metrics['zero_variance']:.0%} of groups have equal rewards and teach nothing"
    for term, why in MISSING.items():
        if above(f"reward_{term}_missing", UNKNOWN):
            found[term] = f"{metrics[f'reward_{term}_missing']:.0%} of captions have no {why}"
    return found

"""Write a run folder in the format of `sft` and `grpo`, with AVWorld references and captions derived from them."""

import json
import random

import numpy as np

from avocado_jax.config import DataConfig, GrpoConfig, as_json
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

WORLD = "world:0:train:0:8:plain"
TERMS = ("checklist", "dialogue", "length", "repetition", "truncated")


def references(clips):
    """Records of the first clips of WORLD."""
    return [record(make_script(0, number, "train", 0), 0) for number in range(clips)]


def write_run(folder, steps, rollouts, clips=4, group=4, caption=None, world=WORLD):
    """Metrics of `steps`, rollouts of the newest `rollouts` of them, rewards drawn at random.

    Args:
        caption: (reference caption, draw, step) -> a caption; by default sentences of the reference, some left out.
    """
    draw, known = random.Random(0), references(clips)
    (folder / "rollouts").mkdir(parents=True)
    config = GrpoConfig(init="base", steps=steps, group=group, data=DataConfig(train=world))
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    lines = []
    for step in range(1, steps + 1):
        way = step / steps
        line = {
            "step": step,
            "epoch": 0,
            "reward": 1 + way + draw.gauss(0, 0.1),
            "reward_checklist": way / 2 + draw.gauss(0, 0.05),
            "reward_dialogue": way / 3 + draw.gauss(0, 0.05),
            "kl": 0.02 * way**2 * draw.uniform(0.9, 1.1),
            "entropy": 1.2 - 0.5 * way + draw.gauss(0, 0.02),
            "length": 60 + 20 * way + draw.gauss(0, 3),
            "loss": None if step == 3 else draw.gauss(0, 0.01),
            "lr": 1e-5 * (1 - way),
            "perf": {"seconds": draw.uniform(2, 2.2), "mfu": None},
        }
        if step % 5 == 0:
            line["heldout_reward"] = 1 + way / 2 + draw.gauss(0, 0.03)
        lines.append(json.dumps(line) + "\n")
        if step > steps - rollouts:
            made = [one for clip in known for one in _group(draw, clip, step, group, caption or some_sentences)]
            (folder / "rollouts" / f"{step}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    (folder / "metrics.jsonl").write_text("".join(lines))


def some_sentences(text, draw, step):
    return ". ".join(part for part in text.split(". ") if draw.random() < 0.8)


def _group(draw, clip, step, group, caption):
    rewards = [[round(draw.random(), 3) for _ in TERMS[:3]] for _ in range(group)]
    totals = np.array(rewards).sum(axis=1)
    for number, (values, total) in enumerate(zip(rewards, totals)):
        text = caption(clip["caption"], draw, step)
        yield {
            "step": step,
            "id": clip["id"],
            "group": number,
            "caption": text,
            "token_ids": [1, 2, 3],
            "length": len(text.split()),
            "rewards": dict(zip(TERMS, [*values, 0.0, 0.0])),
            "reward": float(total),
            "advantage": float((total - totals.mean()) / max(totals.std(), 1e-3)),
        }

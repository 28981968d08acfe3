"""Write train/trl_losses.npz: losses of TRL's GRPO for given log-probabilities, for train/test_objective.py.

pip install --target /tmp/trl --no-deps trl==1.16.0 accelerate datasets pandas pyarrow dill multiprocess xxhash psutil
PYTHONPATH=/tmp/trl:tests python tests/make_trl_losses.py
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from trl.trainer.grpo_trainer import GRPOTrainer

B, G, C = 3, 4, 7
CASES = [
    (loss, level, beta)
    for loss in ("grpo", "dapo", "dr_grpo")
    for level in ("token", "sequence")
    for beta in (0.0, 0.04)
]


def main() -> None:
    """Losses and gradients of every case on one set of random log-probabilities."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, C + 1, (B, G))
    drawn = {name: -rng.exponential(1, (B, G, C)) for name in ("new", "noise_old", "noise_reference", "noise_sampled")}
    new = drawn["new"]
    arrays = {
        "new": new,
        "old": new + 0.3 * (drawn["noise_old"] + 1),
        "reference": new + 0.5 * (drawn["noise_reference"] + 1),
        "sampled": new + 0.3 * (drawn["noise_sampled"] + 1),
        "rewards": rng.random((B, G)),
        "valid": np.arange(C) < lengths[..., None],
    }
    arrays = {name: value.astype(bool if name == "valid" else np.float32) for name, value in arrays.items()}
    rewards = torch.tensor(arrays["rewards"])
    std = rewards.std(dim=1, keepdim=True)  # GRPOTrainer._generate_and_score_completions: nanstd, unbiased, + 1e-4
    arrays["advantage"] = ((rewards - rewards.mean(dim=1, keepdim=True)) / (std + 1e-4)).numpy()

    def rows(name: str) -> torch.Tensor:
        return torch.tensor(arrays[name]).reshape(B * G, *arrays[name].shape[2:])

    mask = rows("valid").int()
    for number, (loss, level, beta) in enumerate(CASES):
        logps = rows("new").requires_grad_()
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, logps=logps, **__: (logps, torch.zeros_like(logps), None),
            importance_sampling_level=level,
            loss_type=loss,
            beta=beta,
            epsilon_low=0.2,
            epsilon_high=0.28,
            max_completion_length=C + 2,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            aux_loss_enabled=False,
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            model=SimpleNamespace(training=False),
            _metrics=defaultdict(lambda: defaultdict(list)),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        )
        prompt = torch.zeros((B * G, 1), dtype=torch.int)
        # As in _generate_and_score_completions with vllm_importance_sampling_mode "token_truncate", cap 2.
        importance = torch.exp((rows("old") - rows("sampled")) * mask).clamp(max=2.0)
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": rows("advantage").reshape(-1),
            "old_per_token_logps": rows("old"),
            "ref_per_token_logps": rows("reference"),
            "importance_sampling_ratio": importance,
            "num_items_in_batch": mask.sum(),
        }
        value = GRPOTrainer._compute_loss(trainer, None, inputs)
        value.backward()
        arrays[f"loss_{number}"] = value.detach().numpy()
        arrays[f"gradient_{number}"] = logps.grad.reshape(B, G, C).numpy()
        logged = trainer._metrics["eval"]
        arrays[f"clipped_{number}"] = np.float32([logged[f"clip_ratio/{bound}_mean"][0] for bound in ("low", "high")])
    cases = np.array([" ".join(map(str, case)) for case in CASES])
    np.savez_compressed(Path(__file__).parent / "train" / "trl_losses.npz", cases=cases, **arrays)


if __name__ == "__main__":
    main()

"""Seeded faults: each must fail the fast tests that it names. Run by hand, not by a suite.

  python tests/mutations.py [--only TEXT]

Each mutation replaces one passage of a file in a copy of the tree and runs its tests there. All named tests are run
once without a mutation first. Prints `killed` or `SURVIVED` for each mutation; exits 1 if one survives, 2 if a passage
is no longer in its file or a test does not run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FAILED = 1  # pytest's status for failed tests; other statuses are errors of the run


class Mutation(NamedTuple):
    """A fault.

    Attributes:
        name: what is wrong.
        path: the file, below avocado_jax/.
        old, new: a passage that occurs once in the file, and its replacement.
        tests: arguments of pytest.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # --- model references, prompts and data sets by their public names
    Mutation(
        "hub: files that are not needed are downloaded",
        "checkpoint/references.py",
        'ignore: str = "*/*"',
        'ignore: str = ""',
        "tests/checkpoint/test_references.py -k needed",
    ),
    Mutation(
        "hub: a download begins from the start",
        "checkpoint/references.py",
        "resume_size=before",
        "resume_size=0",
        "tests/checkpoint/test_references.py -k resumes",
    ),
    Mutation(
        "hub: the sum of a shard is not checked",
        "checkpoint/references.py",
        "if digest != blob.name:",
        "if False:",
        "tests/checkpoint/test_references.py -k damaged",
    ),
    Mutation(
        "hub: a local folder does not take precedence",
        "checkpoint/references.py",
        "HUB.fullmatch(text) is not None and not os.path.exists(text)",
        "HUB.fullmatch(text) is not None",
        "tests/checkpoint/test_references.py -k wins",
    ),
    Mutation(
        "hub: the token is sent to the storage of large files",
        "checkpoint/references.py",
        "build_hf_headers() if same else build_hf_headers(token=False)",
        "build_hf_headers()",
        "tests/checkpoint/test_references.py -k token_is_sent",
    ),
    Mutation(
        "hub: a resumed run follows its branch",
        "checkpoint/references.py",
        'return begun if begun.partition("@")[0] == reference.partition("@")[0] else reference',
        "return reference",
        "tests/checkpoint/test_references.py -k keeps_its_commit",
    ),
    Mutation(
        "bucket: a part of a tensor takes all of it",
        "checkpoint/hf.py",
        "if not is_remote(tensor.file):",
        "if is_remote(tensor.file):\n            return np.ascontiguousarray(self.read(entry)[where])\n        else:",
        "tests/checkpoint/test_references.py -k buckets",
    ),
    Mutation(
        "convert: --reading is ignored",
        "checkpoint/convert.py",
        "_write_beside(checkpoint, folder, reading)",
        "_write_beside(checkpoint, folder, {})",
        "tests/checkpoint/test_references.py -k buckets",
    ),
    Mutation(
        "prompt: media_first of a row is ignored",
        "data/prompt.py",
        'fields.get("media_first", habits.media_first)',
        "habits.media_first",
        "tests/data/test_prompt.py -k system_line",
    ),
    Mutation(
        "prompt: habits are not read in training",
        "train/run.py",
        "habits=habits,",
        "",
        "tests/checkpoint/test_published.py -k habits",
    ),
    Mutation(
        "hub data: a reader follows its branch",
        "data/hub.py",
        "revision=self._dataset.commit)",
        'revision="main")',
        "tests/data/test_hub.py",
    ),
    # --- GRPO and its objective
    Mutation(
        "overlong captions are not masked",
        "train/grpo.py",
        "if config.objective.mask_overlong:",
        "if False:",
        "tests/train/test_grpo.py",
    ),
    Mutation(
        "the trainer scores at temperature 1",
        "train/losses.py",
        'logits = jnp.einsum("ND,VD->NV", hidden, matrix, preferred_element_type=jnp.float32) / temperature',
        'logits = jnp.einsum("ND,VD->NV", hidden, matrix, preferred_element_type=jnp.float32)',
        "tests/train/test_losses.py",
    ),
    Mutation(
        "the policy is scored at temperature 1",
        "train/grpo.py",
        "temperature = config.sampling.temperature",
        "temperature = 1.0",
        "tests/train/test_grpo.py",
    ),
    Mutation(
        "an agreed weight covers one row of a clip only",
        "train/agree.py",
        "reshape(-1, split).min(axis=1)",
        "reshape(-1, split)[:, 0]",
        "tests/train/test_agree.py -k two_rows",
    ),
    Mutation(
        "a record that one holder lost counts",
        "train/agree.py",
        "of_clips = jnp.min(observed, axis=0)",
        "of_clips = jnp.max(observed, axis=0)",
        "tests/train/test_agree.py",
    ),
    Mutation(
        "ratios are not clipped",
        "train/objective.py",
        "jnp.clip(ratio, 1 - low, 1 + high) * advantage)",
        "ratio * advantage)",
        "tests/train/test_objective.py",
    ),
    Mutation(
        "the clipping bounds are exchanged",
        "train/objective.py",
        "gain = clipped(ratio, advantage, config.clip_low, config.clip_high)",
        "gain = clipped(ratio, advantage, config.clip_high, config.clip_low)",
        "tests/train/test_objective.py",
    ),
    Mutation(
        "the KL has the other sign",
        "train/objective.py",
        "d = jnp.where(valid, reference - new, 0)",
        "d = jnp.where(valid, new - reference, 0)",
        "tests/train/test_objective.py",
    ),
    Mutation(
        "the std of a group is biased",
        "train/objective.py",
        "ddof=1",
        "ddof=0",
        "tests/train/test_objective.py",
    ),
    Mutation(
        "the importance weight is not capped",
        "train/objective.py",
        "jnp.minimum(jnp.exp(jnp.where(valid, old - sampled, 0)), cap)",
        "jnp.exp(jnp.where(valid, old - sampled, 0))",
        "tests/train/test_objective.py",
    ),
    Mutation(
        "the constant share ignores the limit",
        "train/objective.py",
        "return valid / (jnp.maximum(jnp.sum(counted), 1) * limit)",
        "return valid / jnp.maximum(jnp.sum(counted), 1)",
        "tests/train/test_objective.py",
    ),
    # --- losses and attention
    Mutation(
        "the log-sum-exp of parts is off by 0.01",
        "models/attention/plain.py",
        "total = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)",
        "total = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0) + 0.01",
        "tests/models/test_attention.py",
    ),
    Mutation(
        "a caption's cache is read one position short",
        "models/attention/plain.py",
        "seen = jnp.arange(keys)[None] <= (first + jnp.arange(q.shape[1]))[:, None]",
        "seen = jnp.arange(keys)[None] < (first + jnp.arange(q.shape[1]))[:, None]",
        "tests/models/test_attention.py",
    ),
    Mutation(
        "splash: captions see each other",
        "models/attention/splash.py",
        "itself = (query // length == key // length) & (query >= key)",
        "itself = query >= key",
        "tests/models/test_attention.py -k splash",
    ),
    Mutation(
        "splash: padding of the clip is visible",
        "models/attention/splash.py",
        "hidden = jnp.where(_padded(valid, 1, room), SEEN, HIDDEN).astype(jnp.int32)",
        "hidden = jnp.full((rows, kv.k.shape[2]), SEEN, jnp.int32)",
        "tests/models/test_attention.py -k splash",
    ),
    Mutation(
        "cudnn: padding of the clip is visible",
        "models/attention/cudnn.py",
        "jnp.pad(clip_valid, ((0, 0), (pad, 0)))[:, None]",
        "jnp.pad(jnp.ones_like(clip_valid), ((0, 0), (pad, 0)))[:, None]",
        "tests/models/test_attention.py",
    ),
    Mutation(
        "the loss counts rows without weight",
        "train/losses.py",
        "return captions.valid * weight[:, None, None]",
        "return captions.valid * jnp.ones_like(weight)[:, None, None]",
        "tests/train/test_losses.py tests/train/test_sft.py",
    ),
    Mutation(
        "the gradient of the output matrix misses the temperature",
        "train/losses.py",
        "(gradient / temperature)[:, None]",
        "gradient[:, None]",
        "tests/train/test_losses.py",
    ),
    Mutation(
        "the height of a picture turns like its width",
        "models/rope.py",
        "axis = np.repeat(np.arange(3), sections)",
        "axis = np.repeat(np.array([0, 2, 2]), sections)",
        "tests/models/test_parity.py -k 'text_layers or logits'",
    ),
    # --- rewards
    Mutation(
        "R_L falls from the upper bound",
        "rewards/length.py",
        "(high - tokens) / (high - low)",
        "(high + low - tokens) / (high - low)",
        "tests/rewards/test_repetition_length.py -k length",
    ),
    Mutation(
        "a short stretch is a collapse",
        "rewards/repetition.py",
        "spans = np.maximum(np.where(units < 50, 5, 4) * units, min_span)",
        "spans = np.where(units < 50, 5, 4) * units",
        "tests/rewards/test_repetition_length.py",
    ),
    Mutation(
        "lines without a speaker on one side score",
        "rewards/dialogue.py",
        "score = (content.astype(jnp.float32) / 2**UNIT + speakers) / 2",
        "score = content.astype(jnp.float32) / 2**UNIT",
        "tests/rewards/test_dialogue.py",
    ),
    Mutation(
        "no lines on either side give 0",
        "rewards/dialogue.py",
        "jnp.where(both == 0, 1.0,",
        "jnp.where(both == 0, 0.0,",
        "tests/rewards/test_dialogue.py",
    ),
    Mutation(
        "a missing answer of the judge counts as 0",
        "rewards/checklist.py",
        "answered = (jnp.arange(len(scores)) < count) & ~jnp.isnan(scores)\n    total",
        "answered = jnp.arange(len(scores)) < count\n    scores = jnp.nan_to_num(scores)\n    total",
        "tests/rewards/test_checklist.py",
    ),
    Mutation(
        "the order of keypoints does not count",
        "rewards/checklist.py",
        "return Verdict(score * (1 - order * (1 - ordered)), coverage, place, ordered)",
        "return Verdict(score, coverage, place, ordered)",
        "tests/rewards/test_checklist.py",
    ),
    Mutation(
        "a weight of a term is ignored",
        "rewards/combine.py",
        "total = total + weight * part",
        "total = total + part",
        "tests/rewards/test_combine.py",
    ),
    Mutation(
        "a collapsed caption keeps its credit for dialogue",
        "rewards/combine.py",
        'if gate and name == "dialogue":',
        "if False:",
        "tests/rewards/test_combine.py",
    ),
    # --- placement, processes, statuses
    Mutation(
        "rows are loaded in the order of devices, not of rows",
        "parallel/batches.py",
        "return sorted(rows[process])",
        "return sorted(rows[process], reverse=True)",
        "tests/parallel/test_device_order.py -k 'rows_of_every or interleave'",
    ),
    Mutation(
        "one process judges all captions",
        "parallel/replicas.py",
        "processes[row % len(processes)]",
        "processes[0]",
        "tests/train/test_agree.py",
    ),
    Mutation(
        "the output matrix is sharded the other way around",
        "parallel/rules.py",
        '(r"embedding|head", PartitionSpec("tensor", "fsdp"))',
        '(r"embedding|head", PartitionSpec("fsdp", "tensor"))',
        "tests/train/test_compiled.py tests/train/test_sft.py",
    ),
    Mutation(
        "a lost peer is final",
        "errors.py",
        'TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")',
        'TRANSIENT = ("DEADLINE_EXCEEDED", "ABORTED")',
        "tests/train/test_exits.py",
    ),
    Mutation(
        "starts are not counted over a preemption without progress",
        "train/supervisor.py",
        'count = before["count"] + 1 if same and step <= before["step"] else 1',
        "count = 1",
        "tests/launch/test_worker.py",
    ),
    Mutation(
        "a failure of an earlier launch ends the next one",
        "train/supervisor.py",
        'return record if record and record.get("launch") == launch else None',
        "return record or None",
        "tests/launch/test_worker.py",
    ),
    Mutation(
        "a signal during the first evaluation loses the step",
        "train/loop.py",
        "flags.step_finished()",
        "pass",
        "tests/train/test_stop.py tests/train/test_loop.py",
    ),
    Mutation(
        "a checkpoint comes before its metrics",
        "train/loop.py",
        "                log.flush()\n",
        "",
        "tests/train/test_loop.py",
    ),
    Mutation(
        "compiled programs are never dropped",
        "parallel/programs.py",
        "jax.clear_caches()",
        "pass",
        "tests/parallel/test_programs.py",
    ),
    # --- sampling and low-rank adapters
    Mutation(
        "the sampler's adapters are merged into bf16 kernels",
        "sampling/weights.py",
        "    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), unstacked(params))\n",
        """    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), unstacked(params))
    from flax.traverse_util import flatten_dict, unflatten_dict

    flat = flatten_dict(weights)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        b, kernel = (*path[:-1], "lora_b"), (*path[:-1], "kernel")
        flat[kernel] = flat[kernel] + 2 * (flat[path] @ flat[b])
        flat[b] = 0 * flat[b]
    weights = unflatten_dict(flat)
""",
        "tests/train/test_sampler.py -k small_updates",
    ),
    Mutation(
        "the scale of adapters is rank / alpha",
        "models/config.py",
        "return self.alpha / self.rank",
        "return self.rank / self.alpha",
        "tests/models/test_lora.py -k fresh",
    ),
    Mutation(
        "rollouts ignore the adapters",
        "train/grpo.py",
        "model=computed(model, model.dtype, scan=False)",
        "model=computed(replace(model, text=replace(model.text, lora=None)), model.dtype, scan=False)",
        "tests/train/test_sampler.py -k agree",
    ),
    Mutation(
        "held-out captions ignore the adapters",
        "train/run.py",
        "    captioner = captioner_in_training(\n",
        """    from dataclasses import replace

    model = replace(model, text=replace(model.text, lora=None))
    captioner = captioner_in_training(
""",
        "tests/train/test_sampler.py -k held_out",
    ),
    Mutation(
        "adapters are merged in the stored dtype",
        "checkpoint/orbax.py",
        "return value.astype(np.float32) + self.update(entry, where) if",
        "return (value.astype(np.float32) + self.update(entry, where)).astype(value.dtype) if",
        "tests/checkpoint/test_load.py -k rounded_once",
    ),
    Mutation(
        "the rounding error is not relative",
        "checkpoint/convert.py",
        "math.sqrt(lost / total) if total",
        "math.sqrt(lost) if total",
        "tests/checkpoint/test_load.py -k rounded_once",
    ),
    Mutation(
        "a sampler that is off-policy is not reported",
        "train/run_grpo.py",
        "warn_of_gap(batch.step + 1, ",
        "(lambda *_: None)(batch.step + 1, ",
        "tests/planning/test_resident.py -k holds",
    ),
    Mutation(
        "sampling stops with the first caption",
        "sampling/generate.py",
        "~jnp.all(loop.stopped)",
        "~jnp.any(loop.stopped)",
        "tests/sampling/test_generate.py -k captions_stop",
    ),
    Mutation(
        "prefill runs the first layer in place of all",
        "models/layers.py",
        "weights = jax.lax.switch(number, branches)",
        "weights = branches[0]()",
        "tests/train/test_sampler.py -k agree",
    ),
    Mutation(
        "a decoding step does not read its own token",
        "models/text.py",
        "written = jnp.arange(captions.k.shape[3]) <= step",
        "written = jnp.arange(captions.k.shape[3]) < step",
        "tests/train/test_sampler.py -k agree",
    ),
    Mutation(
        "decoding reads the padding of clips",
        "models/attention/plain.py",
        "valid = clip_valid[:, None, None, None], written",
        "valid = clip_valid[:, None, None, None] | True, written",
        "tests/sampling/test_generate.py -k parallel",
    ),
    Mutation(
        "prefill is unrolled",
        "models/layers.py",
        "creating = module.is_initializing()",
        "creating = True",
        "tests/sampling/test_program_size.py -k prefill",
    ),
    Mutation(
        "decoding copies the weights of each layer",
        "models/text.py",
        "caches = list(zip(*caches))",
        "caches = tuple(zip(*caches))",
        "tests/sampling/test_program_size.py -k decoding",
    ),
    # --- checkpoints and data
    Mutation(
        "an exported tensor has other values",
        "checkpoint/convert.py",
        "cast = piece.astype(spec.dtype)",
        "cast = (piece * 1.01).astype(spec.dtype)",
        "tests/checkpoint/test_convert.py -k round_trip",
    ),
    Mutation(
        "a partial conversion takes the place of its target",
        "checkpoint/convert.py",
        "(partial / MARK).unlink()\n        partial.rename(target)\n    finally:",
        "(partial / MARK).unlink()\n    finally:\n        partial.rename(target)",
        "tests/checkpoint/test_convert.py -k 'stopped or fills or full'",
    ),
    Mutation(
        "the order of an epoch does not depend on the seed",
        "data/plan.py",
        "np.random.default_rng([plan.seed, EPOCH, epoch])",
        "np.random.default_rng([0, EPOCH, epoch])",
        "tests/data/test_plan.py",
    ),
    Mutation(
        "records that do not fill a batch are dropped",
        "data/plan.py",
        "        left.append(own[full:].tolist())",
        "        left.append([])",
        "tests/data/test_plan.py",
    ),
    Mutation(
        "the checkpoint with the highest metric is kept as the best",
        "checkpoint/training.py",
        "reverse=True, n=self._keep_best",
        "reverse=False, n=self._keep_best",
        "tests/checkpoint/test_training.py -k newest_and_best",
    ),
    Mutation(
        "a lost record counts",
        "data/pipeline.py",
        "if len(lost) > recipe.max_lost_share * max(read, TRIAL):",
        "if len(lost) > read:",
        "tests/data/test_pipeline.py -k lost",
    ),
    Mutation(
        "top-p keeps a token too many",
        "sampling/logits.py",
        "before = jnp.cumsum(probability, axis=-1) - probability",
        "before = jnp.cumsum(probability, axis=-1) - 2 * probability",
        "tests/sampling/test_logits.py",
    ),
    Mutation(
        "banned tokens are drawn",
        "sampling/logits.py",
        "allowed = jnp.where(banned, NEVER, scaled)",
        "allowed = scaled",
        "tests/sampling/test_generate.py -k allowed",
    ),
    Mutation(
        "the sampler ignores the temperature",
        "sampling/logits.py",
        "scaled = logits.astype(jnp.float32) / (sampling.temperature or 1.0)",
        "scaled = logits.astype(jnp.float32)",
        "tests/sampling/test_logits.py",
    ),
    Mutation(
        "sound comes before the picture of its chunk",
        "data/positions.py",
        "for parts, offset, values in ((pictures, 0, at), (sound, len(at), heard)):",
        "for parts, offset, values in ((sound, len(at), heard), (pictures, 0, at)):",
        "tests/data/test_positions.py",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutations with this text in their name or path")
    only = parser.parse_args().only
    chosen = [one for one in MUTATIONS if only in one.name or only in one.path]
    wrong = [one for one in chosen if (ROOT / "avocado_jax" / one.path).read_text().count(one.old) != 1]
    for one in wrong:
        print(f"not once in {one.path}: {one.name}")
    if wrong or not chosen:
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        for name in files.decode().split("\0")[:-1]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
        for tests in dict.fromkeys(one.tests for one in chosen):
            if (status := _pytest(tree, tests)) != 0:
                print(f"without a mutation: status {status} of {tests}")
                return 2
        survived = 0
        for one in chosen:
            path = tree / "avocado_jax" / one.path
            original, begun = path.read_text(), time.monotonic()
            path.write_text(original.replace(one.old, one.new))
            status = _pytest(tree, one.tests)
            path.write_text(original)
            survived += status != FAILED
            outcome = {FAILED: "killed", 0: "SURVIVED"}.get(status, f"NOT RUN (status {status})")
            print(f"{outcome:9} {time.monotonic() - begun:4.0f} s  {one.path}: {one.name}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return int(survived > 0)


def _pytest(tree: Path, tests: str) -> int:
    """The status of pytest in the copy, which is imported instead of the installed package."""
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, shell=True, cwd=tree, env=environment, stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())

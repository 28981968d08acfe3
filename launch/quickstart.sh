#!/usr/bin/env bash
# From a fresh clone to a captioner that learns a new world, on a CPU, with no download but packages.
# Clips of AVWorld -> prepare -> the shipped captioner -> fine-tuning -> what it makes of unseen clips, before and after
# -> to Hugging Face format. Then GRPO: a captioner with bad habits mends them, before and after.
# Can be stopped and started again at any moment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

out=runs/quickstart
say() { printf '\n== %s\n' "$*"; }
compared() { paste "$1" "$2" | awk '{ printf "%-16s %8s -> %s\n", $1, $2, $4 }'; }

say "Clips whose truth is known, to learn from and to be tested on"
.venv/bin/avocado world "$out/train" --clips 320 --seed 0 --level 1 --references 0
.venv/bin/avocado world "$out/test" --clips 16 --seed 0 --level 1 --references 0 --split test
if [[ ! -f $out/shards/manifest.json ]]; then
  .venv/bin/avocado prepare "$out/train/clips.jsonl" "$out/shards" --features --checkpoint avocado_jax/assets/captioner
fi

say "What the shipped captioner makes of them: it knows half of their colours, voices and words"
.venv/bin/avocado evaluate world --data "$out/test/clips.jsonl" --max-new-tokens 160 \
  --out "$out/captions-before.jsonl" | tee "$out/before.txt"

say "Fine-tuning"
.venv/bin/avocado sft configs/world_quick.py --workdir "$out/run"

say "The same clips after it"
.venv/bin/avocado evaluate world --checkpoint "$out/run" --data "$out/test/clips.jsonl" --max-new-tokens 160 \
  --out "$out/captions-after.jsonl" | tee "$out/after.txt"

say "Before and after"
compared "$out/before.txt" "$out/after.txt"

say "Two of these clips"
.venv/bin/python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
before, after = (
    {one["id"]: one["caption"] for one in map(json.loads, (out / f"captions-{when}.jsonl").open()) if "caption" in one}
    for when in ("before", "after")
)
for line in list((out / "test" / "clips.jsonl").open())[:2]:
    record = json.loads(line)
    name = record["id"]
    print(f"{name}\n  before: {before.get(name)}\n  after:  {after.get(name)}\n  truth:  {record['caption']}")
PYTHON

say "To Hugging Face format"
if [[ ! -d $out/captioner ]]; then
  .venv/bin/avocado convert to-hf "$out/run" "$out/captioner"
fi
echo "$out/captioner: transformers loads it, and so does: .venv/bin/avocado caption clip.mp4 --checkpoint $out/captioner"

say "GRPO: first a captioner that leaves things out and falls into loops"
.venv/bin/avocado sft configs/world_habits.py --workdir "$out/habits"
.venv/bin/avocado world "$out/known" --clips 24 --seed 1 --level 0 --references 0 --split test
.venv/bin/avocado evaluate world --checkpoint "$out/habits" --data "$out/known/clips.jsonl" --max-new-tokens 208 \
  --out "$out/captions-habits.jsonl" | tee "$out/habits.txt"

say "Captions of its own, rewarded for keypoints, dialogue and length"
.venv/bin/avocado grpo configs/grpo_world.py --init "$out/habits" --workdir "$out/grpo"
.venv/bin/avocado evaluate world --checkpoint "$out/grpo" --data "$out/known/clips.jsonl" --max-new-tokens 208 \
  --out "$out/captions-grpo.jsonl" | tee "$out/grpo.txt"
.venv/bin/avocado view "$out/grpo"

say "Before and after GRPO"
compared "$out/habits.txt" "$out/grpo.txt"

#!/usr/bin/env bash
# From a fresh clone to a captioner that learns a new world, on a CPU, with no download but packages.
# Clips of AVWorld -> prepare -> the shipped captioner -> fine-tuning -> GRPO -> what each makes of unseen clips
# -> to Hugging Face format. Can be stopped and started again at any moment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

out=runs/quickstart
say() { printf '\n== %s\n' "$*"; }

say "Clips whose truth is known, to learn from and to be tested on"
.venv/bin/avocado world "$out/train" --clips 320 --seed 0 --level 1 --references 0
.venv/bin/avocado world "$out/test" --clips 16 --seed 0 --level 1 --references 0 --split test
if [[ ! -f $out/shards/manifest.json ]]; then
  .venv/bin/avocado prepare "$out/train/clips.jsonl" "$out/shards" --features --reading fewest_pixels=784
fi

say "What the shipped captioner makes of them: it knows half of their colours, voices and words"
.venv/bin/avocado evaluate world --data "$out/test/clips.jsonl" --max-new-tokens 160 \
  --out "$out/captions-before.jsonl" | tee "$out/before.txt"

say "Fine-tuning"
.venv/bin/avocado sft configs/world_quick.py --workdir "$out/run"

say "The same clips after it"
.venv/bin/avocado evaluate world --checkpoint "$out/run" --data "$out/test/clips.jsonl" --max-new-tokens 160 \
  --out "$out/captions-after.jsonl" | tee "$out/after.txt"

say "GRPO: captions of its own, rewarded for keypoints, dialogue and length"
.venv/bin/avocado grpo configs/grpo_quick.py --workdir "$out/grpo"

say "The same clips after that"
.venv/bin/avocado evaluate world --checkpoint "$out/grpo" --data "$out/test/clips.jsonl" --max-new-tokens 160 \
  --out "$out/captions-grpo.jsonl" | tee "$out/grpo.txt"

say "Before, after fine-tuning, after GRPO"
paste "$out/before.txt" "$out/after.txt" "$out/grpo.txt" | awk '{ printf "%-16s %8s -> %8s -> %s\n", $1, $2, $4, $6 }'

say "Two of these clips"
.venv/bin/python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
before, after, grpo = (
    {one["id"]: one["caption"] for one in map(json.loads, (out / f"captions-{when}.jsonl").open()) if "caption" in one}
    for when in ("before", "after", "grpo")
)
for line in list((out / "test" / "clips.jsonl").open())[:2]:
    record = json.loads(line)
    name = record["id"]
    told = {"before": before, "after": after, "GRPO": grpo, "truth": {name: record["caption"]}}
    print(name, *(f"  {when + ':':8}{captions.get(name)}" for when, captions in told.items()), sep="\n")
PYTHON

say "To Hugging Face format"
if [[ ! -d $out/captioner ]]; then
  .venv/bin/avocado convert to-hf "$out/grpo" "$out/captioner"
fi
echo "$out/captioner: transformers loads it, and so does: .venv/bin/avocado caption clip.mp4 --checkpoint $out/captioner"

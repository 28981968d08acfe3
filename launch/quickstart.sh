#!/usr/bin/env bash
# From a fresh clone to a captioner that learns a new world, on a CPU, with no download but packages.
# Clips of AVWorld -> prepare -> what the shipped captioner makes of them -> fine-tuning -> what it makes of them then
# -> to Hugging Face format. Can be stopped and started again at any moment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

out=runs/new
say() { printf '\n== %s\n' "$*"; }

say "Clips of a world that the shipped captioner has not seen: new colours, shapes, voices, lines, grounds"
.venv/bin/avocado world "$out/train" --clips 300 --seed 7 --level 1 --references 0
.venv/bin/avocado world "$out/test" --clips 24 --seed 7 --level 1 --references 0 --split test
if [[ ! -f $out/shards/manifest.json ]]; then
  .venv/bin/avocado prepare "$out/train/clips.jsonl" "$out/shards" --features --reading fewest_pixels=784
fi

say "What the shipped captioner makes of 24 clips that it will not be trained on"
.venv/bin/avocado evaluate world --data "$out/test/clips.jsonl" --max-new-tokens 200 | tee "$out/before.txt"

say "Fine-tuning"
.venv/bin/avocado sft configs/world_new.py --workdir runs/world_new

say "The same 24 clips after it"
.venv/bin/avocado evaluate world --checkpoint runs/world_new --data "$out/test/clips.jsonl" --max-new-tokens 200 \
  --out "$out/captions-after.jsonl" | tee "$out/after.txt"

say "Before and after"
paste "$out/before.txt" "$out/after.txt" | awk '{ printf "%-16s %8s -> %s\n", $1, $2, $4 }'

say "Two of these clips, beside their truth"
.venv/bin/python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
said = {one["id"]: one["caption"] for one in map(json.loads, (out / "captions-after.jsonl").open())}
for line in list((out / "test" / "clips.jsonl").open())[:2]:
    record = json.loads(line)
    print(f"{record['id']}\n  said:  {said.get(record['id'])}\n  truth: {record['caption']}")
PYTHON

say "To Hugging Face format"
if [[ ! -d $out/captioner ]]; then
  .venv/bin/avocado convert to-hf runs/world_new "$out/captioner"
fi
echo "$out/captioner: transformers loads it, and so does: .venv/bin/avocado caption clip.mp4 --checkpoint $out/captioner"

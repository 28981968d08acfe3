#!/usr/bin/env bash
# From a fresh clone to a small captioner in training, on a CPU, with no download but packages.
# Clips of AVWorld -> prepare -> a model of random weights -> fine-tuning -> what it makes of unseen clips, before and
# after -> to Hugging Face format. Can be stopped and started again at any moment.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

out=runs/quickstart
say() { printf '\n== %s\n' "$*"; }

say "Clips whose truth is known, to learn from and to be tested on"
.venv/bin/avocado world "$out/train" --clips 320 --seed 0 --level 0 --references 0
.venv/bin/avocado world "$out/test" --clips 16 --seed 0 --level 0 --references 0 --split test
if [[ ! -f $out/shards/manifest.json ]]; then
  .venv/bin/avocado prepare "$out/train/clips.jsonl" "$out/shards" --features --reading fewest_pixels=784
fi

say "A model of 1.3 million random weights"
if [[ ! -f $out/start/model.safetensors ]]; then
  .venv/bin/python launch/small_checkpoint.py "$out/start"
  echo '{"fewest_pixels": 784}' >"$out/start/reading.json"
fi
.venv/bin/avocado evaluate world --checkpoint "$out/start" --data "$out/test/clips.jsonl" --max-new-tokens 96 |
  tee "$out/before.txt"

say "Fine-tuning"
.venv/bin/avocado sft configs/world_quick.py --workdir "$out/run"

say "The same clips after it"
.venv/bin/avocado evaluate world --checkpoint "$out/run" --data "$out/test/clips.jsonl" --max-new-tokens 96 \
  --out "$out/captions.jsonl" | tee "$out/after.txt"

say "Before and after"
paste "$out/before.txt" "$out/after.txt" | awk '{ printf "%-16s %8s -> %s\n", $1, $2, $4 }'

say "Two of these clips"
.venv/bin/python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
said = {one["id"]: one["caption"] for one in map(json.loads, (out / "captions.jsonl").open())}
for line in list((out / "test" / "clips.jsonl").open())[:2]:
    record = json.loads(line)
    print(f"{record['id']}\n  said:  {said.get(record['id'])}\n  truth: {record['caption']}")
PYTHON

say "To Hugging Face format"
if [[ ! -d $out/captioner ]]; then
  .venv/bin/avocado convert to-hf "$out/run" "$out/captioner"
fi
echo "$out/captioner: transformers loads it, and so does: .venv/bin/avocado caption clip.mp4 --checkpoint $out/captioner"

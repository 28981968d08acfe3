#!/usr/bin/env bash
# From a fresh clone to captions of clips, on a CPU, with no download but packages.
# Makes a virtual environment, two clips of AVWorld and a small random checkpoint, and captions the clips.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

out=runs/quickstart
.venv/bin/avocado world "$out/world" --clips 2 --seed 0
if [[ ! -f $out/checkpoint/model.safetensors ]]; then
  .venv/bin/python launch/random_checkpoint.py "$out/checkpoint" --size tiny
fi
echo
echo "What happens in the first clip, by its truth:"
.venv/bin/python -c "import json; print(json.loads(open('$out/world/clips.jsonl').readline())['caption'])"
echo
echo "What a model of random weights says (the words are noise until a trained checkpoint is used):"
.venv/bin/avocado caption "$out"/world/clips/*.mp4 --checkpoint "$out/checkpoint" --max-new-tokens 40
echo
echo "With a real checkpoint: .venv/bin/avocado caption clip.mp4 --checkpoint DIR"

#!/usr/bin/env bash
# From a fresh clone to captions, fine-tuning and GRPO, on a CPU, with no download but packages.
#
#   bash launch/quickstart.sh          four minutes on two idle cores, after the installation
#   bash launch/quickstart.sh --full   half an hour: fine-tuning on a new world, and a longer GRPO run
#
# Can be stopped with Ctrl-C and started again at any moment. PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1-}" in
  "" | --full) ;;
  -h | --help)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch/quickstart.sh
    exit 0
    ;;
  *)
    echo "quickstart.sh: no such option: $1 (see --help)" >&2
    exit 2
    ;;
esac
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}

out=runs/quickstart
SECONDS=0
say() { printf '\n== %s  [%d:%02d]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }
avocado() { .venv/bin/avocado "$@"; }
compared() { .venv/bin/python launch/compare_captions.py "$@"; }

# evaluate NAME DATA TOKENS [CHECKPOINT]: captions of the clips in DATA to $out/captions-NAME.jsonl
evaluate() {
  avocado evaluate world --data "$out/$2/clips.jsonl" --max-new-tokens "$3" --batch 16 \
    ${4:+--checkpoint "$4"} --out "$out/captions-$1.jsonl" >"$out/$1.txt"
}

short() {
  say "128 clips that no captioner has learned from; their truth is known"
  avocado world "$out/unseen" --clips 128 --seed 3 --level 0 --references 0 --split test

  say "Captions of the captioner that ships, of three of them, beside the truth"
  evaluate shipped unseen 112
  compared "$out/unseen/clips.jsonl" --show 3 "caption=$out/captions-shipped.jsonl"

  say "Another captioner ships with bad habits: before some backgrounds it leaves out speech, before others it stops early"
  evaluate habits unseen 112 avocado_jax/assets/captioner_habits
  compared "$out/unseen/clips.jsonl" "shipped=$out/captions-shipped.jsonl" "habits=$out/captions-habits.jsonl"

  say "Fine-tuning mends it with 240 good captions"
  avocado sft configs/quickstart_sft.py --workdir "$out/quick_sft"
  evaluate sft unseen 112 "$out/quick_sft"

  say "GRPO mends it with rewards for its own captions, without a good one to learn from"
  avocado grpo configs/quickstart_grpo.py --workdir "$out/quick_grpo"
  evaluate grpo unseen 112 "$out/quick_grpo"

  say "Before and after, on the unseen clips"
  compared "$out/unseen/clips.jsonl" "habits=$out/captions-habits.jsonl" "fine-tuned=$out/captions-sft.jsonl" \
    "GRPO=$out/captions-grpo.jsonl"

  say "The page of the GRPO run: its curves, clips, sampled captions and their rewards"
  avocado view "$out/quick_grpo" --last 5

  say "What to do next"
  cat <<TEXT
Open $PWD/$out/quick_grpo/report.html in a browser.
  source .venv/bin/activate
  avocado caption $out/unseen/clips/*.mp4                   # captions of the captioner that ships
  avocado convert to-hf $out/quick_sft $out/captioner       # for transformers, and for avocado caption --checkpoint
  avocado sft configs/quickstart_sft.py --workdir runs/mine --steps 60 --data.train world:0:train:5:480:plain
  bash launch/quickstart.sh --full                          # half an hour: a world that the captioner does not know
Your own data: README.md, "I want to ...".
TEXT
}

full() {
  say "Clips of a new world, to learn from and to be tested on; their truth is known"
  avocado world "$out/train" --clips 320 --seed 0 --level 1 --references 0
  avocado world "$out/test" --clips 16 --seed 0 --level 1 --references 0 --split test
  if [[ ! -f $out/shards/manifest.json ]]; then
    avocado prepare "$out/train/clips.jsonl" "$out/shards" --features --checkpoint avocado_jax/assets/captioner
  fi

  say "What the shipped captioner makes of them: it knows half of their colours, voices and words"
  evaluate before test 160

  say "Fine-tuning"
  avocado sft configs/world_quick.py --workdir "$out/run"

  say "The same clips after it"
  evaluate after test 160 "$out/run"
  compared "$out/test/clips.jsonl" "before=$out/captions-before.jsonl" "after=$out/captions-after.jsonl"

  say "Two of these clips"
  compared "$out/test/clips.jsonl" --show 2 "before=$out/captions-before.jsonl" "after=$out/captions-after.jsonl"

  say "To Hugging Face format"
  if [[ ! -d $out/captioner ]]; then
    avocado convert to-hf "$out/run" "$out/captioner"
  fi
  echo "$out/captioner: transformers loads it, and so does: .venv/bin/avocado caption clip.mp4 --checkpoint $out/captioner"

  say "GRPO: first a captioner that leaves things out and falls into loops"
  avocado sft configs/world_habits.py --workdir "$out/habits"
  avocado world "$out/known" --clips 24 --seed 1 --level 0 --references 0 --split test
  evaluate before-grpo known 208 "$out/habits"

  say "Its own captions, rewarded for keypoints, dialogue and length"
  avocado grpo configs/grpo_world.py --init "$out/habits" --workdir "$out/grpo"
  evaluate after-grpo known 208 "$out/grpo"
  avocado view "$out/grpo"

  say "Before and after GRPO"
  compared "$out/known/clips.jsonl" "before=$out/captions-before-grpo.jsonl" "after=$out/captions-after-grpo.jsonl"
}

if [[ ${1-} == --full ]]; then full; else short; fi
say "Finished"

#!/usr/bin/env bash
# Measure on an accelerator every figure that the README reports or lacks: `bash launch/accelerator.sh OUT.jsonl`.
# One JSON row a benchmark, with the ceilings of the same run; under 10 minutes on one H100 or H200, the most wanted
# first. A benchmark that fails or takes too long adds {"what", "arguments", "error"}, with the phases that it had
# finished, and the next one runs. Needs jax, flax, optax and numpy, and all cores: most of the time is compilation.
# PYTHON=... chooses the interpreter; SIZES=tiny runs all of it on a CPU in minutes, to test the script.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: bash launch/accelerator.sh OUT.jsonl}
python=${PYTHON-python3}
small=3b large=7b clip=16384 half=8192 caption=768 rollout=640 tokens=64 slots=24
if [[ ${SIZES-} == tiny ]]; then
  small=tiny large=tiny clip=1024 half=1024 caption=16 rollout=8 tokens=4 slots=8
fi
: >"$out"

# bench SECONDS ARGUMENTS...
bench() {
  local seconds=$1 row begun=$SECONDS
  shift
  echo "bench $*" >&2
  if row=$(timeout "$seconds" "$python" -m avocado_jax bench "$@" --json 2>"$out.log"); then
    echo "$row" >>"$out"
  else
    printf '{"what": "%s", "arguments": "%s", "error": "status %d: %s"}\n' "$1" "$*" $? \
      "$(tail -n 8 "$out.log" | tr '\n' ';' | tr -cd '[:alnum:] .,:;()_-' | tail -c 800)" >>"$out"
  fi
  tail -n 1 "$out" >&2
  echo "$((SECONDS - begun)) s" >&2
}

step=(grpo --size "$small" --group 8 --clip-tokens "$half" --caption-tokens "$rollout")
bench 110 "${step[@]}"
bench 120 "${step[@]}" --rollout-batches 4
bench 120 "${step[@]}" --rollout-batches 4 --rollout-int8
bench 100 caption --size $large --slots $slots --clip-tokens $clip --caption-tokens $rollout
bench 50 prefill --size $large --clip-tokens $clip
bench 50 decode --size $large --group 1 --clip-tokens $clip --caption-tokens $tokens # one clip at a time
bench 50 decode --size $large --group 8 --clip-tokens $clip --caption-tokens $tokens
bench 70 sft --size $small --group 1 --clip-tokens $half --caption-tokens $caption
bench 50 rewards --captions 64 --caption-tokens 1000
rm -f "$out.log"

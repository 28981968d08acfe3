#!/usr/bin/env bash
# What every host of a job runs, whoever launched it: `bash launch/worker.sh sft CONFIG --workdir gs://BUCKET/RUN ...`.
# Ends with the command's own status; with 75 (start all hosts again) where jax ended it since another host was lost.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source launch/env.sh

child=
trap '[[ -z $child ]] || kill -TERM "$child"' TERM INT # to the command: it ends its step, saves and gives 75
"${AVOCADO-.venv/bin/avocado}" "$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
  wait "$child"
  status=$?
done
if ((status == 134)); then # SIGABRT
  echo "launch: a host of this job was lost, or its process died; start all hosts again" >&2
  status=75
fi
exit "$status"

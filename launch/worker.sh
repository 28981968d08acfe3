#!/usr/bin/env bash
# Every host of a job runs this, with any launcher: `bash launch/worker.sh sft CONFIG --workdir gs://BUCKET/RUN ...`.
# avocado_jax/train/supervisor.py counts the starts and chooses the exit status for the launcher.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 3
source launch/env.sh

python=${AVOCADO_PYTHON-.venv/bin/python}
if ! "$python" -c 'import avocado_jax.train.supervisor'; then
  echo "launch: $python cannot import avocado_jax: the installation is incomplete" >&2
  exit 3
fi
secrets=()
[[ -z ${AVOCADO_SECRETS-} ]] || secrets=("$python" launch/read_secrets.py)
exec ${secrets[@]+"${secrets[@]}"} "$python" -m avocado_jax.train.supervisor "${AVOCADO-.venv/bin/avocado}" "$@"

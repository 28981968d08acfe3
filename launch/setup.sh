#!/usr/bin/env bash
# On a host of a TPU slice: Python and the package with extras, in .venv: `bash launch/setup.sh tpu wandb`. Python is
# uv's: that of the hosts' Ubuntu 22.04 is 3.10, and its python3.11 a release candidate. Run it again after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${*:-tpu}
uv=$HOME/.uv
[[ -x $uv/bin/uv ]] || python3 -m pip install --quiet --upgrade --target "$uv" uv==0.13.9
export UV_PYTHON_PREFERENCE=${UV_PYTHON_PREFERENCE-only-managed}
"$uv/bin/uv" venv --quiet --allow-existing --python 3.11 .venv
"$uv/bin/uv" pip install --quiet --python .venv/bin/python --requirement requirements.txt --editable ".[${extras// /,}]"

#!/usr/bin/env bash
# On a host of a TPU slice: what the product needs, in .venv. Its system's Python may be older than 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! "${PYTHON-python3.11}" -c 'import ensurepip' 2>/dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -qq --yes python3.11 python3.11-venv
fi
PYTHON=${PYTHON-python3.11}
source launch/environment.sh
install tpu --editable '.[tpu]'

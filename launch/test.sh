#!/usr/bin/env bash
# Lint, then every test that is not marked slow (under 10 minutes on two cores); with --slow all of them.
# Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install tests --requirement tests/requirements.txt

marks=(-m "not slow")
if [[ ${1-} == --slow ]]; then
  marks=()
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile ${marks[@]+"${marks[@]}"} "$@"

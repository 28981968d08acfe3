#!/usr/bin/env bash
# Lint, then the fast tests (11 minutes on two cores with an empty compile cache); with --slow the slow ones too (an hour).
# Tests marked soak run by hand: .venv/bin/python -m pytest -m soak
# Other arguments go to pytest. A run past its time limit prints the stacks of its processes and fails.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install tests --requirement tests/requirements.txt

# The page of `avocado view` is tested in a real browser, which comes with the system's packages.
if ! command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null; then
  echo "installing: apt-get install chromium"
  if ! { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium >/dev/null; }; then
    echo "the tests of avocado view need Chromium: install it, or run this as root where there is apt-get" >&2
    exit 2
  fi
fi

marks=() minutes=45
if [[ ${1-} == --slow ]]; then
  marks=(-m "not soak") minutes=85
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .

# Tests wait for sockets, timeouts and other processes a fifth of the time: one test process more than there are cores.
processes=$(($(.venv/bin/python -c 'import os; print(os.cpu_count())') + 1))

# SIGUSR1 makes every test process print its stacks (tests/conftest.py); half a minute later all of them are killed.
status=0
timeout --signal=USR1 --kill-after=30 "${TEST_MINUTES-$minutes}m" \
  .venv/bin/python -m pytest --numprocesses "$processes" --dist loadfile --no-loadscope-reorder --max-worker-restart=0 \
  --durations=20 ${marks[@]+"${marks[@]}"} "$@" || status=$?
if ((status == 124 || status == 137)); then
  echo "launch/test.sh: stopped after ${TEST_MINUTES-$minutes} minutes; the stacks of its processes are above" >&2
fi
exit "$status"

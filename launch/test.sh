#!/usr/bin/env bash
# Lint, then every test that is not marked slow (under 10 minutes on two cores); with --slow all of them.
# Other arguments go to pytest.
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

marks=(-m "not slow")
if [[ ${1-} == --slow ]]; then
  marks=()
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder ${marks[@]+"${marks[@]}"} "$@"

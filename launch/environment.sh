# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with what the given files ask for.
# Nothing is installed twice: a stamp in .venv holds the checksum of what was installed.
# shellcheck shell=bash

# install NAME PIP-ARGUMENTS...  (the stamp is called after NAME)
install() {
  local name=$1 stamp sum
  shift
  stamp=.venv/.installed-$name
  sum=$(cat pyproject.toml requirements.txt tests/requirements.txt | cksum)
  if [[ ! -f $stamp || $(cat "$stamp") != "$sum" ]]; then
    echo "installing: pip install $*"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
    echo "$sum" >"$stamp"
  fi
}

python=${PYTHON:-python3}
if [[ ! -x .venv/bin/pip ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
  }
  "$python" -m venv .venv
fi
install product --requirement requirements.txt --editable '.[world]'

#!/usr/bin/env bash
# On a TPU VM: worker.sh as a systemd service that outlives the connection; `bash launch/service.sh sft CONFIG ...`.
# It is started again on every status but 0 and 2. `sudo systemctl stop avocado` ends the step, saves and stops it.
set -euo pipefail
cd "$(dirname "$0")/.."
# What an earlier start left would hold /dev/vfio, and the chips with it.
sudo systemctl stop avocado 2>/dev/null || true
sudo systemctl reset-failed avocado 2>/dev/null || true
sudo systemd-run --unit=avocado --uid="$(id -u)" --gid="$(id -g)" --working-directory="$PWD" \
  --property=Restart=on-failure --property=RestartPreventExitStatus=2 --property=RestartSec=15 \
  --property=StartLimitIntervalSec=86400 --property=StartLimitBurst=50 \
  --property=KillMode=mixed --property=TimeoutStopSec=120 \
  bash launch/worker.sh "$@"

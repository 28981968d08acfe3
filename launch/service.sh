#!/usr/bin/env bash
# On a TPU VM: worker.sh as a systemd service that outlives the connection; `bash launch/service.sh sft CONFIG ...`.
# systemd starts it again on every status but 0, 2 and 3; worker.sh bounds the starts. `sudo systemctl stop avocado`
# finishes the step, saves and stops it. All hosts of a launch get the same AVOCADO_LAUNCH.
set -euo pipefail
cd "$(dirname "$0")/.."
# A process of an earlier start would keep /dev/vfio, and with it the chips.
sudo systemctl stop avocado 2>/dev/null || true
sudo systemctl reset-failed avocado 2>/dev/null || true
sudo systemd-run --unit=avocado --uid="$(id -u)" --gid="$(id -g)" --working-directory="$PWD" \
  --property=Restart=on-failure --property=RestartPreventExitStatus="2 3" --property=RestartSec=15 \
  --property=StartLimitIntervalSec=0 --property=KillMode=mixed --property=TimeoutStopSec=120 \
  --setenv=AVOCADO_LAUNCH="${AVOCADO_LAUNCH-}" \
  bash launch/worker.sh "$@"

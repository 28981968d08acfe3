#!/usr/bin/env bash
# On a TPU VM: run a command in this folder as the systemd service `avocado`: `bash launch/service.sh COMMAND...`.
# It outlives the connection, starts again after a reboot, and is restarted on every status but 0, 2 and 3; worker.sh
# bounds the restarts. A service that runs is replaced, since its process keeps /dev/vfio and with it the chips.
set -euo pipefail
cd "$(dirname "$0")/.."
(umask 077 && printf '%q ' exec "$@" >job.sh) # systemd does not read a shell's quotes
sudo tee /etc/systemd/system/avocado.service >/dev/null <<UNIT
[Unit]
Description=avocado
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0
[Service]
Type=exec
User=$(id -un)
WorkingDirectory=$PWD
ExecStart=/bin/bash job.sh
Restart=on-failure
RestartPreventExitStatus=2 3
RestartSec=15
KillMode=mixed
TimeoutStopSec=120
[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl --quiet enable avocado
sudo systemctl restart avocado

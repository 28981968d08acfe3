"""Record the JobSet that xpk makes of the GKE launcher's command, for tests/launch/test_manifests.py.

  PATH=PLACE/bin:$PATH python tests/make_jobset.py > tests/launch/jobset.yaml    # PLACE: where xpk 1.16.0 is installed

The first line is the command, the rest is the manifest as it came.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHERE = "--name avocado-sft --cluster c1 --project my-project --zone us-east5-a --image registry/avocado:1"
DATA = "--init gs://bucket/base --data.train gs://bucket/shards"
STAGE = f"sft configs/sft_7b.py --workdir gs://bucket/run --topology v5p:4x4x4 --slices 2 --unplanned {DATA}"
LAUNCH = "20260101-000000"  # which launch the command is part of
JOB = f"start --dry-run {WHERE} {STAGE}"

if __name__ == "__main__":
    command = [sys.executable, ROOT / "launch" / "gke.py", *JOB.split()]
    env = os.environ | {"AVOCADO_LAUNCH": LAUNCH}
    done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
    print("# " + "\n".join(line.rstrip() for line in done.stdout.splitlines()))

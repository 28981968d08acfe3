"""Record the manifests of each stage: the JobSet that xpk renders, and the task that SkyPilot parses.

  python tests/make_manifests.py XPK SKY    # virtual environments with xpk 1.16.0 and with skypilot 0.14.1

Writes tests/launch/manifests/LAUNCHER-STAGE.yaml: the commands of the dry run as comments, then the manifest.
SkyPilot's own parser reads every task. tests/launch/test_manifests.py compares them with what is printed today.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "tests" / "launch" / "manifests"
# The value of the key must be in no manifest.
ENV = {"AVOCADO_LAUNCH": "20260101-000000", "WANDB_ENTITY": "a team", "WANDB_API_KEY": "value-of-the-key"}
KEY = "--env WANDB_ENTITY --secret WANDB_API_KEY"
HOST = f"--topology v6e:2x2 {KEY}"
STAGES = {
    "sft": f"--topology v5p:4x4x4 {KEY} sft configs/sft_7b.py --workdir gs://bucket/sft --init gs://bucket/base "
    "--data.train gs://bucket/shards --accumulate 2 --wandb captions",
    "grpo": f"--topology v6e:8x8 {KEY} grpo configs/grpo_7b.py --workdir gs://bucket/grpo --init gs://bucket/sft "
    "--data.train gs://bucket/shards",
    "caption": f"{HOST} caption gs://bucket/clips --checkpoint gs://bucket/grpo --out gs://bucket/captions --shard 0/4",
    "prepare": f"{HOST} prepare gs://bucket/clips.jsonl gs://bucket/shards --tokenizer gs://bucket/base",
    "evaluate": f"{HOST} evaluate daily-omni --data gs://bucket/daily-omni.json --videos gs://bucket/videos "
    "--checkpoint gs://bucket/grpo --out gs://bucket/results --judge https://HOST/v1 --judge-model M",
}
SLICES = "--slices 2 --unplanned " + STAGES["sft"].replace(" --accumulate 2", "")
WHERE = "--project my-project --zone us-east5-a --cluster c1 --image registry/avocado:1"
JOBS = {
    **{("gke", stage): f"start --dry-run --name {stage} {WHERE} {words}" for stage, words in STAGES.items()},
    ("gke", "slices"): f"start --dry-run --name slices {WHERE} {SLICES}",
    **{("sky", stage): f"start --dry-run --name {stage} --zone us-east5-a {words}" for stage, words in STAGES.items()},
}
PARSE = "import sys, sky; [print(sky.Task.from_yaml(path).name, 'is read') for path in sys.argv[1:]]"


def recorded(output: str) -> str:
    """The text of a file: commands of a dry run as comments, the manifest without blanks at line ends."""
    lines = [line.rstrip() for line in output.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith(("apiVersion:", "name:")))
    return "\n".join([*(f"# {line}" for line in lines[:first]), *lines[first:]]) + "\n"


if __name__ == "__main__":
    xpk, sky = map(Path, sys.argv[1:])
    env = os.environ | ENV | {"PATH": f"{xpk.absolute()}/bin:{os.environ['PATH']}"}
    MANIFESTS.mkdir(exist_ok=True)
    for (launcher, stage), words in JOBS.items():
        command = [sys.executable, ROOT / "launch" / f"{launcher}.py", *words.split()]
        done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
        (MANIFESTS / f"{launcher}-{stage}.yaml").write_text(recorded(done.stdout))
    tasks = sorted(MANIFESTS.glob("sky-*.yaml"))
    subprocess.run([sky / "bin" / "python", "-c", PARSE, *tasks], check=True)

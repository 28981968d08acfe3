"""Input that the launchers refuse in one line: arguments of jobs and stages, and missing tools."""

import subprocess

import make_manifests
import pytest

WHERE = "--name run1 --project my-project --zone us-east5-a"
CLUSTER = "--cluster c1 --project my-project --zone us-east5-a"
SFT = make_manifests.STAGES["sft"]
DATA = "--init gs://bucket/base --data.train gs://bucket/shards --accumulate 2"
START = f"start {WHERE} --topology v5p:4x4x4 sft configs/sft_7b.py --workdir gs://bucket/run {DATA}"
HOST = f"start {WHERE} --topology v6e:2x2"
CAPTION = f"{HOST} caption gs://bucket/clips --out gs://bucket/captions"
EVALUATE = f"{HOST} evaluate daily-omni --data gs://bucket/daily.json --videos gs://bucket/videos --out gs://bucket/o"
PREPARE = f"{HOST} prepare gs://bucket/c.jsonl gs://bucket/shards"
GRPO = (
    f"{HOST} --unplanned grpo configs/grpo_7b.py --workdir gs://bucket/run --init gs://bucket/sft "
    "--data.train gs://bucket/shards --rewards.judge lm --rewards.judge_model"
)


def replace_words(old, new, words=START):
    assert old in words
    return words.replace(old, new)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (replace_words("gs://bucket/run", "'gs://buc ket/run'"), "--workdir 'gs://buc ket/run': not gs://BUCKET/RUN"),
        (replace_words("gs://bucket/run", "'gs://bucket;x/run'"), "--workdir 'gs://bucket;x/run': not gs://BUCKET/RUN"),
        (replace_words("gs://bucket/run", "gs://bucket"), "not gs://BUCKET/RUN"),
        (replace_words("--workdir gs://bucket/run", ""), "sft: --workdir gs://BUCKET/RUN is required"),
        (replace_words("gs://bucket/base", "'gs://b;/x'"), "--init 'gs://b;/x'"),
        (replace_words("gs://bucket/base", "./runs/base"), "hosts share no disk; give gs://BUCKET/FOLDER"),
        (
            replace_words("gs://bucket/base", "ORG/NAME"),
            "run `avocado convert from-hf ORG/NAME gs://BUCKET/FOLDER` first",
        ),
        (f"{GRPO} ORG/NAME", "--rewards.judge_model 'ORG/NAME': hosts share no disk"),
        (f"{GRPO} judges/of/mine", "--rewards.judge_model 'judges/of/mine': hosts share no disk; give gs://"),
        (f"{START} --data.heldout runs/held", "--data.heldout 'runs/held'"),
        (replace_words("my-project", "My_Project"), "--project 'My_Project'"),
        (replace_words("us-east5-a", "us-east5"), "--zone 'us-east5'"),
        (replace_words("run1", "'$(id)'"), "--name '$(id)'"),
        (replace_words("4x4x4", "3x3x3"), "--topology 'v5p:3x3x3': not one of v5e: 2x4"),
        (replace_words("--name", "--slices 0 --name"), "--slices 0: at least 1"),
        (f"{START} --mesh.slices 2", "follows from --slices"),
        (f"{START} --mesh.tensor 3", "is not 64 chips"),
        (f"{START} --accumulate 3", "128 rows are not divided by data x fsdp x accumulate = 192"),
        (f"{START} --accumulat 3", "did you mean accumulate?"),
        (replace_words("configs/sft_7b.py", "configs/../x.py"), "not a file of configs/"),
        (replace_words("sft_7b", "no_such"), "no such config file"),
        (replace_words("sft_7b", "grpo_7b"), "a GrpoConfig; sft takes a SftConfig"),
        (
            replace_words("v5p:4x4x4", "v5e:8x8").replace(" --accumulate 2", ""),
            "does not fit v5e:8x8: 30.1 of 15.75 GiB",
        ),
        (f"{START} --remat dots", "has no plan of this: run `avocado plan configs/sft_7b.py"),
        (
            replace_words("--name", "--slices 2 --name").replace("--accumulate 2", ""),
            "--mesh.slices 2` and add its result",
        ),
        (
            replace_words("--name", "--env NOT_SET --name"),
            "--env NOT_SET: not an environment variable that is set here",
        ),
        (
            replace_words("--name", "--env WANDB_API_KEY --name"),
            "--env WANDB_API_KEY: looks like a key; pass it as --secret",
        ),
        (replace_words("--name", "--secret 'A=b' --name"), "--secret 'A=b': not the name of an environment variable"),
        (replace_words("--topology v5p:4x4x4", ""), "--topology SLICE is required, before sft"),
        (f"{START} --wandb 'two\nlines'", "a line break"),
        (
            f"{CAPTION} --workdir gs://bucket/run",
            "no argument '--workdir'; options of the launcher come before caption",
        ),
        (f"{CAPTION} --max-new-tokens many", "caption: argument --max-new-tokens: invalid int value"),
        (replace_words("--name", "--slices 2 --name", CAPTION), "caption: takes one host"),
        (replace_words("2x2", "4x4", CAPTION), "for more, start several jobs with --shard I/N"),
        (replace_words("gs://bucket/captions", "captions", CAPTION), "out 'captions': the host's disk is temporary"),
        (f"{HOST} caption gs://bucket/clips", "out '': the host's disk is temporary"),
        (f"{HOST} caption --out gs://bucket/captions", "caption: name clips to caption, or --manifest FILE"),
        (f"{CAPTION} --checkpoint runs/grpo/x", "caption: checkpoint 'runs/grpo/x': not on the host"),
        (f"{CAPTION} --manifest clips.jsonl", "caption: manifest 'clips.jsonl': not on the host"),
        (f"{CAPTION} --prompt-file prompts.txt", "caption: prompt_file 'prompts.txt': not on the host"),
        (
            replace_words("gs://bucket/clips", "gs://bucket/clips ORG/clips", CAPTION),
            "inputs 'ORG/clips': not on the host",
        ),
        (replace_words("gs://bucket/shards", "", PREPARE), "prepare: the following arguments are required: OUT"),
        (replace_words("gs://bucket/shards", "shards", PREPARE), "prepare: out 'shards': the host's disk is temporary"),
        (replace_words("gs://bucket/c.jsonl", "c.jsonl", PREPARE), "prepare: source 'c.jsonl': not on the host"),
        (f"{PREPARE} --media videos/", "prepare: media 'videos/': not on the host"),
        (f"{PREPARE} --tokenizer ./base", "prepare: tokenizer './base': not on the host"),
        (f"{HOST} evaluate world --data gs://bucket/clips.jsonl", "evaluate: out '': the host's disk is temporary"),
        (f"{EVALUATE} --limit 0.5", "evaluate: argument --limit: invalid int value"),
        (
            replace_words("gs://bucket/daily.json", "daily.json", EVALUATE),
            "evaluate: data 'daily.json': not on the host",
        ),
        (replace_words("gs://bucket/videos", "videos", EVALUATE), "evaluate: videos 'videos': not on the host"),
        (
            replace_words("--videos gs://bucket/videos", "", EVALUATE),
            "evaluate: --videos gs://BUCKET/FOLDER is required",
        ),
        (f"{EVALUATE} --judge-model judge", "evaluate: judge_model 'judge': not on the host"),
        (f"{EVALUATE} --prompts prompts/", "evaluate: prompts 'prompts/': not on the host"),
        (f"{EVALUATE} --prompt-file prompts.txt", "evaluate: prompt_file 'prompts.txt': not on the host"),
        (f"{EVALUATE} --captions c.jsonl", "evaluate: captions 'c.jsonl': not on the host"),
        (f"{EVALUATE} --checkpoint ./run", "evaluate: checkpoint './run': not on the host"),
        (f"logs {WHERE} --hosts 1", "unrecognized: --hosts 1"),
    ],
)
def test_invalid_jobs_are_refused_in_one_line(launch, words, complaint):
    assert_refused(launch, "gcloud", words, complaint)


@pytest.mark.parametrize(
    ("script", "words", "complaint"),
    [
        ("gke", "image --image 'a b:1'", "--image 'a b:1': not REGISTRY/NAME:TAG"),
        ("gke", f"cluster {CLUSTER} --topology v5p:4x4x4".replace("c1", "C1"), "--cluster 'C1'"),
        ("sky", f"start --name run1 {make_manifests.SLICES}", "SkyPilot takes one slice"),
        (
            "sky",
            f"start --name run1 --secret OPENAI_API_KEY_NOT_SET {SFT}",
            "OPENAI_API_KEY_NOT_SET: not set here",
        ),
    ],
)
def test_invalid_jobs_of_other_launchers_are_refused(launch, script, words, complaint):
    assert_refused(launch, script, words, complaint)


def assert_refused(launch, script, words, complaint):
    status, out, err = launch(script, words)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("planned: ")]
    assert complaint in line


def test_missing_tool_is_an_error(launch, monkeypatch):
    def absent(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", absent)
    status, _, err = launch("gke", f"status {CLUSTER}")
    assert (status, err) == (2, "gke.py: gcloud: not installed\n")
    assert "pip install xpk" in launch("gke", make_manifests.JOBS["gke", "slices"])[2]

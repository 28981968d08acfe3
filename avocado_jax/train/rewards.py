"""The rewards of a run: reference arrays, terms computed on the devices, judge answers shared by all processes."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig, RewardConfig
from avocado_jax.data.pipeline import Batch, Source
from avocado_jax.data.probes import read_probe
from avocado_jax.data.storage import StorageError
from avocado_jax.errors import InputError
from avocado_jax.jsonl import read_lines
from avocado_jax.parallel.backend import on_cpu
from avocado_jax.parallel.batches import process_rows, rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.replicas import observe, row_owners
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.combine import (
    ALWAYS,
    JUDGES,
    PROBE_JUDGES,
    TERMS,
    References,
    Thresholds,
    combine,
    make_references,
    missing,
    score_captions,
)
from avocado_jax.rewards.extra import load_terms
from avocado_jax.rewards.text import limits_for
from avocado_jax.rewards.vocabulary import make_table, word_weights
from avocado_jax.train.extra import Computed, HostTerm
from avocado_jax.train.judges import Judge, open_judge
from avocado_jax.train.programs import by_rows
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run import Setup
from avocado_jax.typing import Array, Float, Int, Probe

MAX_CHARACTERS, MAX_FEATURES = 512, 1024  # maximum distinct characters of a clip's dialogue, features of its keypoints
SAMPLE_RECORDS = 4  # records that are checked for missing references at start-up
NOT_REQUESTED, UNANSWERED = -2.0, -1.0  # values in place of scores while processes share their answers


class Judged(NamedTuple):
    """A judge's answers for a batch, the same on all processes. Items are keypoints or probes."""

    answers: Float[Array, "B G K"]  # NaN for padding and missing answers
    requested: Int[Array, ""]  # number of items sent to the judge
    missing: Int[Array, ""]  # number of items without an answer


# Term -> answers; empty if no term is computed on the hosts.
Answers = Mapping[str, Judged | Computed]
JUDGE_FIELDS = {  # config fields of each term's judge and its model
    "checklist": ("rewards.judge", "rewards.judge_model"),
    "probes": ("rewards.probe_judge", "rewards.probe_model"),
}
ITEMS = {"checklist": "keypoints", "probes": "probes"}  # names of the items that each term's judge answers


class Rewards(NamedTuple):
    """The reward functions of a run.

    Attributes:
        references: record fields -> references, numpy [B, ...], with one shape for all records.
        judge: (rollout, batch) -> a function that waits for the answers. Starts the judges and the user terms on the
            hosts, and returns immediately.
        terms: (rollout, references, answers) -> value of each term, [B G]; NaN without a reference.
        combine: (terms of complete groups, weight [B], normalize=`rewards.normalize`) -> (reward [B G], metrics over
            the rows with weight).
        program: shapes of a rollout -> the program of `terms`.
        check: raises `Unjudged` if too many answers are missing, or the exception of a user term. Waits for the
            devices; all processes raise together.
    """

    references: Callable[[Sequence[Mapping[str, Any]]], References]
    judge: Callable[[Rollout, Batch], Callable[[], Answers]]
    terms: Callable[[Rollout, References, Answers], dict[str, Array]]
    combine: Callable[..., tuple[Array, dict[str, Array]]]
    program: Callable[[Rollout], Program]
    check: Callable[[Answers], None]


class Unjudged(OSError):
    """A judge left more keypoints or probes without an answer than the config allows."""


def caption_text(setup: Setup, stops: Sequence[int], ids: Sequence[int]) -> str:
    """The text of a sampled caption, without its stop."""
    return setup.words.decode([token for token in ids if token not in stops]).strip()


@contextmanager
def open_rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int]) -> Iterator[Rewards]:
    """Open the rewards of `config` for the duration of the block. Warns about terms without references.

    Raises:
        InputError: a limit is invalid, or a judge or a user term cannot be loaded.
    """
    rewards = config.rewards
    for name in ("keypoints", "lines", "scenes", "questions"):
        if getattr(rewards, name) < 1:
            raise InputError(f"rewards.{name}: {getattr(rewards, name)} is not a number from 1")
    if rewards.judge not in JUDGES:
        raise InputError(f"rewards.judge: {rewards.judge!r} is not one of {', '.join(JUDGES)}")
    if rewards.probe_judge not in PROBE_JUDGES:
        raise InputError(f"rewards.probe_judge: {rewards.probe_judge!r} is not one of {', '.join(PROBE_JUDGES)}")
    wanted = {}  # (kind, model) of the judge of each term that needs one
    if rewards.checklist and rewards.judge != "lexical":
        wanted["checklist"] = rewards.judge, rewards.judge_model
    if rewards.probes:
        wanted["probes"] = rewards.probe_judge, rewards.probe_model or rewards.judge_model
    for term, (kind, model) in wanted.items():
        if not model:
            judge, names = JUDGE_FIELDS[term]
            raise InputError(f"{judge} is {kind}: {names} names its folder, or the model at the endpoint")
    with ExitStack() as stack:
        opened = {
            judge: stack.enter_context(open_judge(*judge, config.dtype, _endpoint(rewards, *judge)))
            for judge in dict.fromkeys(wanted.values())  # terms with the same judge share it
        }
        judges = {term: opened[judge] for term, judge in wanted.items()}
        if "probes" in judges:
            judges["probes"] = judges["probes"].probes
        yield make_rewards(config, setup, stops, judges)


def _endpoint(rewards: RewardConfig, kind: str, model: str) -> Endpoint | None:
    if kind != "remote":
        return None
    cache = Path(rewards.judge_cache) if rewards.judge_cache else None
    return Endpoint(rewards.judge_url, model, cache=cache, patience=rewards.judge_patience)


def caption_texts(path: str) -> list[str]:
    """Read the captions of a JSON lines file, such as a manifest.

    Raises:
        InputError: the file cannot be read, or a line has no "caption".
    """
    return [line["caption"] for _, line in read_lines(Path(path), {"caption": str})]


def make_rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int], judges: Mapping[str, Judge]) -> Rewards:
    """Build the reward functions of `config`.

    Args:
        judges: open judges of terms in ITEMS. Without a checklist judge, the lexical judge is used; without a probe
            judge, there is no `probes` term.
    """
    settings = config.rewards
    table = make_table(setup.words.json, word_weights(caption_texts(settings.idf)) if settings.idf else None)
    limits = limits_for(config.sampling.tokens)._replace(quotes=settings.lines, merge=settings.merge)
    thresholds = Thresholds(
        low=settings.covered_low,
        high=settings.covered_high,
        length_low=settings.low,
        length_high=settings.high,
        long_units=settings.long_units,
    )
    weights = {name: getattr(settings, name) for name in TERMS if name in ALWAYS or getattr(settings, name)}
    extra = load_terms(settings.extra, TERMS)
    on_device = [term for term in extra if term.kind == "jax"]
    on_hosts = {term.name: term for term in extra if term.kind == "host"}
    weights |= {term.name: term.weight for term in extra}
    most_items = {"checklist": settings.keypoints, "probes": settings.questions}
    events = settings.scenes if settings.timing else 0

    @partial(jax.jit, out_shardings=rows_sharding(setup.mesh))
    def score_terms(
        table: Any, tokens: Array, lengths: Array, references: References, answers: dict[str, Array]
    ) -> dict[str, Array]:
        keypoints, probes = answers.get("checklist"), answers.get("probes")
        terms = score_captions(table, tokens, lengths, references, thresholds, keypoints, limits, probes, on_device)
        return terms | {name: answers[name] for name in on_hosts}

    def references(records: Sequence[Mapping[str, Any]]) -> References:
        with on_cpu():  # called in the input thread while the accelerators compute a step
            return make_references(table, records, limits, settings.keypoints, MAX_FEATURES, MAX_CHARACTERS, events)[0]

    def judge(rollout: Rollout, batch: Batch) -> Callable[[], Answers]:
        waiting = {term: start(rollout, batch) for term, start in started.items()}
        return lambda: {term: wait() for term, wait in waiting.items()}

    def terms(rollout: Rollout, references: References, judged: Answers) -> dict[str, Array]:
        answers = {term: result.answers for term, result in judged.items()}
        return score_terms(table, rollout.captions.targets, rollout.lengths, references, answers)

    def program(rollout: Rollout) -> Program:
        rows, group, _ = rollout.captions.targets.shape
        example = references([{}])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), example)
        answers = {term: jax.ShapeDtypeStruct((rows, group, most_items[term]), jnp.float32) for term in judges}
        answers |= {name: jax.ShapeDtypeStruct((rows, group), jnp.float32) for name in on_hosts}
        inputs = by_rows((shapes, answers), setup.mesh)
        return Program("rewards", score_terms, (table, rollout.captions.targets, rollout.lengths, *inputs))

    def reward(
        terms: dict[str, Array], weight: Array, normalize: bool = settings.normalize
    ) -> tuple[Array, dict[str, Array]]:
        counted = {name: jnp.where((weight > 0)[:, None], value, jnp.nan) for name, value in terms.items()}
        total, metrics = combine(counted, weights, normalize, settings.gate)
        for name in weights:  # over the rows with weight
            counts = jnp.broadcast_to((weight > 0)[:, None], counted[name].shape)
            metrics[f"{name}_missing"] = jnp.sum(jnp.isnan(counted[name]) & counts) / jnp.maximum(jnp.sum(counts), 1)
        return total, metrics

    def check(judged: Answers) -> None:
        for term, result in judged.items():
            if term in hosts:
                hosts[term].check(result)
                continue
            requested, missing = jax.device_get((result.requested, result.missing))
            if missing > settings.max_unjudged * requested:
                raise Unjudged(
                    f"the judge left {missing} of {requested} {ITEMS[term]} of a step without an answer; "
                    "the run can be resumed"
                )

    if jax.process_index() == 0:
        _warn_of_missing(setup.source, references, [name for name, weight in weights.items() if weight])
    text = partial(caption_text, setup, stops)
    started = {
        term: _shared(judge, setup.mesh, most_items[term], text, items_of(term)) for term, judge in judges.items()
    }
    hosts = {name: HostTerm(term, setup.mesh, text) for name, term in on_hosts.items()}
    started |= {name: term.start for name, term in hosts.items()}
    return Rewards(references, judge, terms, reward, program, check)


def items_of(term: str) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Return the function that maps record fields to the items of a term: keypoint texts or valid probes."""

    def keypoints(fields: Mapping[str, Any]) -> list[str]:
        return [point["text"] for point in fields.get("keypoints") or ()]

    def probes(fields: Mapping[str, Any]) -> list[Probe]:
        found = []
        for probe in fields.get("probes") or ():
            with suppress(InputError):  # `prepare` refuses a line with an invalid probe
                found.append(read_probe(probe))
        return found

    return {"checklist": keypoints, "probes": probes}[term]


def _warn_of_missing(source: Source, references: Callable, terms: Sequence[str]) -> None:
    """Print which terms have no reference in the first readable records."""
    fields = []
    for number in range(min(SAMPLE_RECORDS, len(source.index.ids))):
        with suppress(InputError, StorageError, TimeoutError):  # the run counts and reports lost records
            fields.append(source[number].fields)
    if not fields:
        return
    print(f"rewards: reading the references of {len(fields)} clips", file=sys.stderr, flush=True)  # compiles at first
    probes = np.array([not items_of("probes")(record) for record in fields])
    for name, without in {**missing(references(fields)), "probes": probes}.items():
        if name in terms and without.any():
            count = f"{without.sum()} of the first {len(fields)} clips"
            print(
                f"rewards.{name}: {count} have no reference for this term, which adds nothing to their reward",
                file=sys.stderr,
            )


def _shared(
    judge: Judge,
    mesh: Mesh,
    limit: int,
    text: Callable[[Sequence[int]], str],
    items: Callable[[Mapping[str, Any]], list[Any]],
) -> Callable[[Rollout, Batch], Callable[[], Judged]]:
    """Share a term's judge between processes: one process judges each caption, all processes receive the answers.

    Args:
        limit: K, maximum judged items of a clip.
        text: token ids of a caption -> text.
        items: record fields -> keypoints or probes.
    """
    rows, replicated = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    @partial(jax.jit, out_shardings=Judged(rows, replicated, replicated))
    def share(observed: Float[Array, "R B G K"]) -> Judged:
        scores = jnp.max(observed, axis=0)  # scores of the owner; other processes have NOT_REQUESTED
        answers = jnp.where(scores >= 0, scores, jnp.nan)
        return Judged(answers, jnp.sum(scores > NOT_REQUESTED), jnp.sum(scores == UNANSWERED))

    def start(rollout: Rollout, batch: Batch) -> Callable[[], Judged]:
        tokens, lengths, weight = jax.device_get(gather((rollout.captions.targets, rollout.lengths, batch.weight)))
        size, group = lengths.shape
        local, owners = process_rows(mesh, size, jax.process_index()), row_owners(mesh, size)
        places, captions, requested = [], [], []
        for index, (row, record) in enumerate(zip(local, batch.records, strict=True)):
            wanted = items(record)[:limit]
            if wanted and weight[row] and owners[row] == jax.process_index():
                places += [(index, caption) for caption in range(group)]
                captions += [text(ids[:length].tolist()) for ids, length in zip(tokens[row], lengths[row])]
                requested += [wanted] * group
        wait = judge(captions, requested)

        def collect() -> Judged:
            observed = np.full((len(local), group, limit), NOT_REQUESTED, np.float32)
            for index, wanted, scores in zip(places, requested, wait(), strict=True):
                known = scores[: len(wanted)]
                observed[index][: len(wanted)] = np.where(np.isfinite(known), known, UNANSWERED)
            with jax.debug_nans(False):  # an item without an answer is NaN
                return share(observe(mesh, local, size, observed))

        return collect

    return start

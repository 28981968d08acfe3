"""Effects of config fields in the calls of a run (started_run.py): each function returns the values found."""

from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from started_run import ADVANTAGES, GRPO_OPTIMIZER, Stop, loss_of

from avocado_jax.config import ObjectiveConfig, as_sft
from avocado_jax.models.config import SIZES
from avocado_jax.parallel import processes
from avocado_jax.planning import program as planning
from avocado_jax.rewards.text import limits_for
from avocado_jax.train import grpo, inputs, rollout, run
from avocado_jax.train.rewards import Judged, Unjudged
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.state import initial_state, split
from avocado_jax.typing import Clip


def observed(calls, where):
    """The values at a place: `FUNCTION.ARGUMENT[.ATTRIBUTE...]` of all calls, or what a function of the calls gives."""
    if callable(where):
        return where(calls)
    function, _, path = where.partition(".")
    return [attrgetter(path)(call) for call in calls.calls[function]]


def epochs(calls):
    setup = run.set_up(replace(calls.config, steps=0), getattr(calls.config, "split", 1))
    plan = setup.plan
    return [setup.steps / plan.epoch_steps * (plan.together + plan.spares) / plan.together]


def trained(calls):
    """Whether moments and gradients exist for adapters only."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(calls.shapes.optimizer)]
    gradients = flatten_dict(calls.gradient[0].trained, sep="/")
    is_lora = [
        any("lora_a" in path for path in some) and "embedding" not in str(some) for some in (paths, [*gradients])
    ]
    return ["lora"] if all(is_lora) else []


def frozen_dtypes(calls):
    return [str(leaf.dtype) for leaf in jax.tree.leaves(split(calls.shapes.params, "lora")[1])]


def nominal_model(calls):
    model, _ = planning.model_and_buckets(replace(calls.config, init=""))
    return [name for name, size in SIZES.items() if size.text.width == model.text.width]


def nominal_clip(calls):
    return [tuple(bucket.shape) for bucket in planning.model_and_buckets(replace(calls.config, init=""))[1]]


def in_fine_tuning(calls):
    """GRPO reads no reference captions; `ablate` fine-tunes on them for comparison."""
    return [as_sft(calls.config).data.caption_tokens]


def limits(calls):
    """Limits of the captions that are parsed for rewards."""
    tokens = calls.config.sampling.tokens
    words = {one.limits.words for one in calls.make_references + calls.score_captions}
    return [tokens] if words == {limits_for(tokens).words} else []


def reference_dtypes(calls):
    return [str(leaf.dtype) for leaf in jax.tree.leaves(calls.results["grpo_program"][0].reference)]


def group(calls):
    """Group size of the rollouts that are trained on."""
    return [max(one.group for one in calls.roll_out)]


def heldout_batches(calls):
    """Clips of a step, and of a held-out batch, which has as many rows as a step with two rows a clip."""
    trained, evaluated = calls.plan_batches[:2]
    return [trained.batch, evaluated.batch / 2]


def rolled_out(calls):
    """Number of batches whose captions are sampled together."""
    return max(len(program.args[1]) for program in calls.compile_ahead[0].programs if program.name == "rollout")


def rows(calls):
    """Number of rows of a step that this process reads."""
    return len(calls.batches[0].rows)


def cache_dir(calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "prepared_reading", lambda _: None)
        patch.setattr(
            inputs, "open_shards", lambda name, reading, cache: SimpleNamespace(check=lambda: None, dir=cache)
        )
        return [str(inputs.open_source("shards", calls.open_source[0].config)[0].dir)]


def world_references(calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "WorldSource", lambda *args: args)
        return [inputs.open_source("world:0:train:0:4", calls.open_source[0].config)[0][4]]


def timeouts(field):
    """Timeouts at their consumers, and those that the command passes on."""

    def stop(*args):
        raise Stop(*args)

    def consumed(calls):
        given = calls.init_distributed[0].timeouts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "deadline", stop)
            patch.setattr(processes.liveness, "start", stop)
            patch.setattr(processes.jax.config, "update", lambda *_: None)
            try:
                if field == "start":
                    processes._initialize("here:1", 2, 0, given)
                with processes.init_distributed(None, None, None, None, given):
                    pass
            except Stop as stopped:
                return [stopped.args[{"start": 0, "heartbeat": 0, "step": 1}[field]]]

    return consumed


def on_rollouts(field):
    """Of the rollouts that are trained on; those of evaluation are greedy, one a row."""
    return lambda calls: [getattr(one.sampling, field) for one in calls.roll_out if one.group == calls.config.group]


def drawn(name, field=None):
    """An argument of the sampler in a rollout of this run, or a field of it."""

    def sampler(calls):
        given = next(one for one in calls.roll_out if one.group == calls.config.group)
        received = {}

        def generate(params, clip, keys, *_, **options):
            received.update(options, keys=jax.random.key_data(keys).tolist())
            raise Stop

        clip = Clip(*[None] * len(Clip._fields))._replace(tokens=np.zeros((2, 1)))
        with pytest.MonkeyPatch.context() as patch, suppress(Stop):
            patch.setattr(rollout, "generate", generate)
            options = dict(group=2, split=1, stops=(), seed=given.seed, mesh=None)
            rollout.roll_out(None, (clip,), (None,), 0, None, model=None, sampling=given.sampling, **options)
        return [getattr(received[name], field) if field else received[name]]

    return sampler


def random_numbers(calls):
    """Random numbers of the run's seed."""
    (keys,) = drawn("keys")(calls)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), rollout.ROLLOUT), 0)
    return [5] if keys == jax.random.key_data(rollout.caption_keys(key, jnp.arange(2), 2)).tolist() else []


def weight(term):
    return lambda calls: [one.weights[term] for one in calls.combine]


def shout(caption, reference):
    """A user's term."""
    return 1.0


def known(captions, references):
    """Another."""
    return [1.0] * len(captions)


def extra_terms(calls):
    """Device and host terms, with their weights."""
    (on_device,), weights = calls.score_captions[0].extra, calls.combine[0].weights
    hosts = [f"host:field_effects:{one.term.name}={weights[one.term.name]}" for one in calls.HostTerm]
    return [(f"jax:field_effects:{on_device.name}={weights[on_device.name]}", *hosts)]


def first_judge(*path):
    """Arguments of the judge of keypoints, which is opened first."""
    return lambda calls: [attrgetter(".".join(path))(calls.open_judge[0])]


def probes_answered(calls):
    """Whether only the judge of probes answers probes."""
    return [calls._shared[1].judge]


def max_unjudged(calls):
    """Between these shares of missing answers a step is refused."""
    check = calls.results["make_rewards"][0].check
    check({"checklist": Judged(None, np.int32(100), np.int32(25))})
    with suppress(Unjudged):
        check({"probes": Judged(None, np.int32(100), np.int32(26))})
        return []
    return [0.25]


def updates(field, other):
    """Updates per rollout, as counted by the optimizer and by the schedule."""

    def counted(calls):
        config, zero = calls.config, jnp.zeros(())
        totals = grpo._UpdateTotals(grpo.ObjectiveTotals(*[zero] * len(grpo.ObjectiveTotals._fields)), zero, zero)
        make = GRPO_OPTIMIZER(config.optim, 10)
        state = initial_state({"lora_a": jnp.ones(2)}, make, "all")
        clip = Clip(*[None] * len(Clip._fields))._replace(length=np.ones(6))
        sampled = Rollout(None, None, np.ones((6, 2)), np.ones((6, 2)))
        batch = grpo.Experience(clip, None, sampled, None, None, np.ones(6))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo, "batch_gradient", lambda params, *_, **__: (params, zero, totals))
            options = dict(model=None, adamw=make, rate=lambda count: count)
            after, _ = grpo.grpo_update(state, batch, config=replace(config, train="all"), **options)
        done = max(int(leaf) for leaf in jax.tree.leaves(after.optimizer) if leaf.dtype == jnp.int32)
        planned = {one.steps // config.steps for one in calls.optimizer + calls.schedule}
        return [count / getattr(config, other) for count in (done, *planned)]

    return counted


def in_the_update(field):
    """Arguments of the run's update; later calls come from `loss_of`."""
    return lambda calls: [getattr(calls.objective[0].config, field)]


def changes_the_loss(field):
    """The loss of some captions with only this field changed differs from that without."""

    def effect(calls):
        objective = replace(ObjectiveConfig(), **{field: getattr(calls.config.objective, field)})
        return [getattr(objective, field)] if loss_of(objective) != loss_of(ObjectiveConfig()) else []

    return effect


def limit_changes_the_loss(calls):
    constant, tokens = ObjectiveConfig(aggregate="constant"), calls.config.sampling.tokens
    return [tokens] if loss_of(constant, tokens) != loss_of(constant) else []


def changes_advantages(field):
    def effect(calls):
        values = np.array([[0.1, 0.4, 0.2, 0.9]], np.float32)
        objective = replace(ObjectiveConfig(), **{field: getattr(calls.advantages[0].config, field)})
        differs = not np.allclose(ADVANTAGES(values, objective), ADVANTAGES(values, ObjectiveConfig()))
        return [getattr(objective, field)] if differs else []

    return effect

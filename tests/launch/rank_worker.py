"""Run by one process or by each of several: train on recorded rollouts, and write down gradients
and weights.

    python -m tests.launch.rank_worker record CONFIG ROLLOUTS             sample and grade
    train.steps batches
    python -m tests.launch.rank_worker replay CONFIG ROLLOUTS OUT CASES   update on them, once for
    each case; under torchrun, as a rank

CASES: a JSON object, name -> overrides of the config. OUT: a folder for NAME.pt.
"""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rlfr_vlm import commands
from rlfr_vlm.algorithm.credit import make_samples, needs_scoring
from rlfr_vlm.config import load_config
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream
from rlfr_vlm.learner import learner as parts
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import join
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.training.collect import collect
from rlfr_vlm.training.loop import split_evenly
from rlfr_vlm.training.scoring import score_samples
from rlfr_vlm.training.update import update


def record(cfg, out):
    """Batches of the untrained policy. With several ranks in mind, prompts with pictures stand at
    even places where there are others too.
    """
    prompts, _, bad = commands.rl_prompts(cfg)
    policy = Policy(cfg.model)
    batches = []
    with Grader(cfg.reward.grader, cfg.reward.answer) as grader:
        engine = make_engine(cfg, policy)
        source = PromptSource(
            prompts,
            Renderer(policy, cfg.data, cfg.data.train),
            PromptStream(len(prompts), cfg.seed, cfg.data.shuffle),
            bad,
        )
        for step in range(1, cfg.train.steps + 1):
            batch = collect(cfg, engine, source, grader, step)
            batches.append([(g.group, g.outcomes) for g in batch.kept])
        engine.close()
    Path(out).write_bytes(pickle.dumps(batches))


def replay(config, recorded, out, cases):
    """Every case from the same untrained policy, one after the other."""
    settings = json.loads(cases)
    ranks = join(load_config(config, tuple(next(iter(settings.values())))))
    for name, overrides in settings.items():
        found = replayed(load_config(config, tuple(overrides)), recorded, ranks)
        if ranks.first:
            torch.save(found, Path(out) / f"{name}.pt")
    ranks.leave()


def replayed(cfg, recorded, ranks):
    """One update per recorded batch: gradients before clipping, as the optimiser gets them, and the
    weights at the end.
    """
    policy = Policy(cfg.model)
    learner = parts.make_learner(cfg, policy, ranks)
    gradients = []
    watch(learner.optimizer, gradients)
    metrics = []
    for step, batch in enumerate(pickle.loads(Path(recorded).read_bytes()), 1):
        places = ranks.places(len(batch))
        groups = [whole(batch[place][0]) for place in places]
        outcomes = [outcome for place in places for outcome in batch[place][1]]
        samples = make_samples(groups, outcomes, cfg.seed, step, cfg.algorithm, places)
        if needs_scoring(cfg, samples, ranks):
            samples = score_samples(cfg, learner, samples)
        for part in split_evenly(samples, cfg.algorithm.updates_per_rollout, ranks):
            metrics.append(update(cfg, learner, part)[0])
    weights = {
        name: t.clone() for bucket in policy.weight_buckets(2**30) for name, t in bucket.items()
    }
    found = {"gradients": gradients, "weights": weights, "metrics": metrics}
    if learner.field is not None:
        found["field"] = {name: t.clone() for name, t in learner.field.tensors().items()}
    for optimizer in (learner.optimizer, learner.flow_optimizer):
        if hasattr(optimizer, "destroy"):
            optimizer.destroy()
    return found


def field_with_an_opinion(cfg, policy, seed, make=parts.make_field):
    """A new field, away from zero."""
    field = make(cfg, policy, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in field.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return field


def whole(group):
    """Siblings share one prompt object: pickling keeps that."""
    return replace(group, rollouts=tuple(replace(r, prompt=group.prompt) for r in group.rollouts))


def watch(optimizer, seen):
    """Keep the gradient of every update, whole."""
    if hasattr(optimizer, "engine"):
        from deepspeed.utils import safe_get_full_grad

        step = optimizer.engine._take_model_step

        def noted(*arguments):
            seen.append(
                {name: safe_get_full_grad(p).clone() for name, p in optimizer.parameters.items()}
            )
            return step(*arguments)

        optimizer.engine._take_model_step = noted
    else:
        optimizer.torch.register_step_pre_hook(
            lambda *_: seen.append(
                {
                    name: optimizer.master.get(name, p).grad.clone()
                    for name, p in optimizer.parameters.items()
                }
            )
        )


if __name__ == "__main__":
    parts.make_field = field_with_an_opinion
    mode, config, *rest = sys.argv[1:]
    record(load_config(config), *rest) if mode == "record" else replay(config, *rest)

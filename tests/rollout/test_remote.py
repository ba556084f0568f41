"""The trainer's side of rollout workers: equal samples wherever they come from, and nothing from a
worker whose weights are not right.

The workers here are real ones, driven in this process over the protocol that Ray's actors implement
in a run.
"""

import pickle
from dataclasses import replace

import pytest
import torch

from rlfr_vlm.config import RolloutConfig, load_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.rollout.remote import RemoteEngine, WorkerLost, shares
from rlfr_vlm.rollout.worker import (
    ErrorMessage,
    Refusal,
    Request,
    RolloutWorker,
    answered,
    packed,
    unpacked,
)
from tests.runs import make_config, make_data

SAMPLING = SamplingConfig(group_size=3, temperature=1.0, max_new_tokens=6, seed_key=(0, 1))


class InProcess:
    """Workers whose calls are carried out when they are made; what goes in and out is pickled, as
    between processes.
    """

    def __init__(self, cfg, count):
        self.cfg, self.workers = cfg, [RolloutWorker(cfg) for _ in range(count)]
        self.calls = []  # (worker, method) of all that were made
        self.deaths = {}  # number of the call -> "dies" or "hangs"
        self.killed = []
        self.unreachable = set()  # hang before anybody has a connection to them

    def __len__(self):
        return len(self.workers)

    def share(self, value):
        return pickle.dumps(value)

    def submit(self, worker, method, *arguments):
        arguments = [
            pickle.loads(a) if isinstance(a, bytes) else pickle.loads(pickle.dumps(a))
            for a in arguments
        ]
        fate = self.deaths.pop(len(self.calls), None)
        self.calls.append((worker, method))
        if fate == "dies":
            self.workers[worker] = RolloutWorker(self.cfg)
            return WorkerLost("it was killed")
        if fate == "hangs":
            return TimeoutError()
        if fate == "is out of reach":
            self.unreachable.add(worker)
        if worker in self.unreachable:
            return WorkerLost("it is unavailable")
        return pickle.loads(pickle.dumps(answered(self.workers[worker], method, arguments)))

    def result(self, call, timeout_s):
        if isinstance(call, Exception):
            raise call
        return call

    def kill(self, worker):
        self.killed.append(worker)
        self.unreachable.discard(worker)
        self.workers[worker] = RolloutWorker(self.cfg)


@pytest.fixture
def parts(model_folder, tmp_path):
    """A config, its policy and six encoded prompts with pictures."""
    make_data(tmp_path)
    cfg = load_config(
        make_config(
            tmp_path, model_folder("qwen2_5_vl"), rollout={"engine": "hf", "sync_bucket_mib": 1}
        )
    )
    policy = Policy(cfg.model)
    rows = load_prompts(cfg.data.train, cfg.data, BadRows(cfg.data))[:6]
    renderer = Renderer(policy, cfg.data, cfg.data.train)
    return cfg, policy, [renderer.encode(row) for row in rows]


def moved(policy, by=0.01):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(by)
    policy.version += 1
    return policy


def content(groups):
    return [
        [
            (r.sample_index, r.token_ids, r.logprobs, r.text, r.finish_reason, r.policy_version)
            for r in g.rollouts
        ]
        for g in groups
    ]


def as_local(policy, prompts, pieces=2):
    """What the HF engine beside the policy samples, in as many batches."""
    engine, size = HFEngine(RolloutConfig(), policy), len(prompts) // pieces
    return [
        group
        for i in range(pieces)
        for group in engine.sample(prompts[i * size : (i + 1) * size], SAMPLING)
    ]


def test_workers_sample_what_the_policy_would_and_in_order(parts):
    cfg, policy, prompts = parts
    workers = InProcess(cfg, 2)
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.load_weights(moved(policy))
    groups = engine.sample(prompts, SAMPLING)
    assert content(groups) == content(as_local(policy, prompts))
    assert [g.prompt for g in groups] == prompts  # this rank's own, with their vision tensors
    assert groups[0].rollouts[0].policy_version == 1
    assert {worker for worker, method in workers.calls if method == "sample"} == {0, 1}
    assert engine.name == "hf"


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 2), (4, 2), (2, 3), (3, 4)])
def test_ranks_share_workers_evenly(ranks, workers):
    load = [0] * workers
    for rank in range(ranks):
        parts = shares(12, rank, ranks, workers)
        assert [i for _, a, b in parts for i in range(a, b)] == list(range(12))
        for worker, a, b in parts:
            load[worker] += b - a
    assert max(load) == min(load)


def test_no_prompts_make_no_calls():
    assert shares(2, 0, 1, 3) == [(1, 0, 1), (2, 1, 2)]
    assert shares(0, 0, 1, 3) == []


@pytest.mark.parametrize("fate", ["dies", "hangs", "is out of reach"])
@pytest.mark.parametrize("method", ["load_bucket", "finish_load", "sample"])
def test_a_lost_worker_changes_no_token(parts, method, fate):
    """Whenever it is lost, the next load and the next samples are whole, and the losses are
    counted.
    """
    cfg, policy, prompts = parts
    whole = RemoteEngine(cfg, policy, Ranks(), undisturbed := InProcess(cfg, 2))
    whole.load_weights(moved(policy))
    expected = content(whole.sample(prompts, SAMPLING))
    calls = [
        i for i, (worker, name) in enumerate(undisturbed.calls) if (worker, name) == (1, method)
    ]
    workers = InProcess(cfg, 2)
    workers.deaths = {calls[-1]: fate}
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.limit_s = 8.0  # of which half is waited before one out of reach is ended
    engine.load_weights(policy)
    assert content(engine.sample(prompts, SAMPLING)) == expected
    assert len(engine.losses) == 1 and engine.losses[0].startswith("engine 1: ")
    assert workers.killed == ([] if fate == "dies" else [1])


def test_negative_control_a_worker_that_refuses_nothing_samples_from_initial_weights(
    parts, monkeypatch
):
    cfg, policy, prompts = parts
    sample = RolloutWorker.sample
    whole = RemoteEngine(cfg, policy, Ranks(), undisturbed := InProcess(cfg, 2))
    whole.load_weights(moved(policy, by=0.1))
    expected = content(whole.sample(prompts, SAMPLING))
    monkeypatch.setattr(
        RolloutWorker,
        "sample",
        lambda self, requests, sampling, _: sample(self, requests, sampling, self._sync_id),
    )
    workers = InProcess(cfg, 2)
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.load_weights(policy)
    workers.workers[1] = anew = RolloutWorker(cfg)  # it died while nobody asked it anything
    anew.engine._version = policy.version  # nor does its engine refuse
    assert content(engine.sample(prompts, SAMPLING)) != expected
    assert not engine.losses and len(undisturbed.calls) > 0


def test_what_a_living_worker_sampled_is_kept(parts):
    cfg, policy, prompts = parts
    workers = InProcess(cfg, 2)
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.load_weights(policy)
    workers.calls.clear()
    workers.deaths = {1: "dies"}
    engine.sample(prompts, SAMPLING)
    assert [worker for worker, method in workers.calls if method == "sample"] == [0, 1, 1]


def test_above_the_limit_of_losses_the_run_stops(parts):
    cfg, policy, prompts = parts
    cfg = cfg.model_copy(update={"ray": cfg.ray.model_copy(update={"max_restarts": 1})})
    workers = InProcess(cfg, 2)
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.load_weights(policy)
    workers.deaths = {len(workers.calls): "dies", len(workers.calls) + 1: "hangs"}
    with pytest.raises(
        StoppedError,
        match=r"engine 1: no answer to a batch of prompts within .* ray.max_restarts=1 were "
        r"allowed",
    ):
        engine.sample(prompts, SAMPLING)


def test_a_sync_that_hangs_names_the_worker_and_the_weights(parts):
    cfg, policy, _ = parts
    cfg = cfg.model_copy(update={"ray": cfg.ray.model_copy(update={"max_restarts": 0})})
    workers = InProcess(cfg, 2)
    workers.deaths = {1: "hangs"}
    with pytest.raises(
        StoppedError, match=r"engine 1: no answer to the weights from `model\..*` on within"
    ):
        RemoteEngine(cfg, policy, Ranks(), workers).load_weights(policy)


def test_initial_weights_are_never_sampled_from(parts):
    cfg, _, prompts = parts
    worker = RolloutWorker(cfg)
    assert worker.state().sync_id is None
    requests = [Request.of(prompt) for prompt in prompts]
    assert worker.sample(requests, SAMPLING, "some load") == Refusal("stale")
    policy = Policy(cfg.model)
    buckets = [packed(bucket) for bucket in policy.weight_buckets(2**18)]
    for bucket in buckets[1:]:  # the first was sent to the one before it
        worker.load_bucket(bucket, "a")
    assert worker.finish_load(1, "a", len(buckets)).sync_id is None
    for bucket in buckets:
        worker.load_bucket(bucket, "b")
    assert worker.finish_load(1, "b", len(buckets)).sync_id == "b"
    assert worker.sample(requests, SAMPLING, "a") == Refusal("stale")
    worker.load_bucket(buckets[0], "c")
    assert worker.sample(requests, SAMPLING, "b") == Refusal("stale")


def test_the_probe_stops_a_worker_that_computes_something_else(parts):
    cfg, policy, _ = parts
    workers = InProcess(cfg, 2)
    broken = workers.workers[1].engine
    original = broken.finish_load

    def finish(version):
        original(version)
        with torch.no_grad():
            broken.sampler.model.get_output_embeddings().weight.mul_(1.5)

    broken.finish_load = finish
    with pytest.raises(
        StoppedError, match="engine 1 computes something else with the same weights"
    ):
        RemoteEngine(cfg, policy, Ranks(), workers).load_weights(policy)


def test_pictures_that_stand_in_no_row_are_sent(parts):
    cfg, policy, prompts = parts
    renderer = Renderer(policy, cfg.data, cfg.data.train, "blank")
    blank = [renderer.encode(p.prompt) for p in prompts[:2]]
    workers = InProcess(cfg, 1)
    engine = RemoteEngine(cfg, policy, Ranks(), workers)
    engine.load_weights(policy)
    workers.calls.clear()
    assert content(engine.sample(blank, SAMPLING)) == content(as_local(policy, blank, pieces=1))
    assert len(workers.calls) == 2  # refused, then sent
    workers.calls.clear()
    engine.sample(prompts[:2], SAMPLING)
    assert len(workers.calls) == 1
    assert max(len(pickle.dumps(Request.of(p))) for p in prompts) < 4000  # a path, no pixels


def test_a_prompt_that_reads_differently_there_stops_the_run(parts):
    cfg, policy, prompts = parts
    engine = RemoteEngine(cfg, policy, Ranks(), InProcess(cfg, 1))
    engine.load_weights(policy)
    other = replace(prompts[0], token_ids=(*prompts[0].token_ids, 5))
    with pytest.raises(
        StoppedError,
        match=r"prompt `train0`.* as \d+ tokens, the engine on .* as \d+: are model files",
    ):
        engine.sample([other], SAMPLING)


def test_one_step_ahead_a_restarted_worker_gets_the_weights_that_the_others_have(parts):
    """The policy has moved on meanwhile."""
    cfg, policy, prompts = parts
    ahead = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"staleness": 1})})
    workers = InProcess(ahead, 2)
    engine = RemoteEngine(ahead, policy, Ranks(), workers)
    engine.load_weights(policy)
    expected = content(engine.sample(prompts, SAMPLING))
    moved(policy)
    workers.deaths = {len(workers.calls): "dies"}
    assert content(engine.sample(prompts, SAMPLING)) == expected
    engine.load_weights(policy)
    assert content(engine.sample(prompts, SAMPLING)) != expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_travel_as_bytes(dtype):
    tensor = torch.randn(5, 3).to(getattr(torch, dtype)).T  # not contiguous
    sent = pickle.loads(pickle.dumps(packed({"a": tensor, "b": tensor[0, 0]})))
    assert torch.equal(unpacked(sent["a"]), tensor) and unpacked(sent["b"]) == tensor[0, 0]


def test_errors_travel_as_values():
    class Refusing:
        def act(self):
            raise UserError("no room")

    found = answered(Refusing(), "act", ())
    assert found == ErrorMessage("UserError", "no room") and isinstance(found.error(), UserError)
    assert ErrorMessage.of(type("Own", (StoppedError,), {})("x")) == ErrorMessage(
        "StoppedError", "x"
    )

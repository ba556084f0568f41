"""launcher=ray: training ranks and rollout engines as actors, placed, watched and started again.
The only module that imports ray.

Trainers are started again by this module, as a whole and from the last checkpoint: their process
group cannot do without one of them. Engines are started again by Ray, one by one and in place: the
trainers' handles stay good, and a call made meanwhile waits or says so. An engine that was started
anew samples nothing before it was given weights (rollout/worker.py).

Ray reads its settings from the environment when it is imported, so that no import stands at the
top.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlfr_vlm.config import Config
from rlfr_vlm.errors import Preempted, StoppedError, UserError
from rlfr_vlm.launch.actors import Actor, EngineActor, TrainerActor
from rlfr_vlm.launch.placement import (
    Needs,
    answers,
    find_cluster,
    own_address,
    passed_on,
    private_folder,
    store_bytes,
)
from rlfr_vlm.launch.processes import Ended, Place, brief, end_process, send, verdict
from rlfr_vlm.ranks import LOOPBACK, Launch
from rlfr_vlm.rollout.remote import WorkerLost
from rlfr_vlm.rollout.worker import ErrorMessage

START_ATTEMPTS = 3
START_SECONDS = 300.0  # for actors to start
PLACE_SECONDS = 60.0  # for others on the cluster to make room
GRACE_SECONDS = 3.0  # for the other ranks to say what they met, once one of them has failed
POLL_SECONDS = 0.3
LOG_SECONDS = 1.0  # for the last lines of the actors to reach the terminal
PING_SECONDS = 1.0
KILL_SECONDS = 2.0  # for Ray to end an actor
NODE_SECONDS = 30.0  # for another machine to do it


def say(message: str) -> None:
    """A line for the user."""
    print(message, file=sys.stderr, flush=True)


class RayWorkers:
    """The engine actors, as remote.Workers."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines = list(engines)

    def __len__(self) -> int:
        return len(self._engines)

    def share(self, value: Any) -> Any:
        """Put it into the object store, which workers read without a copy."""
        import ray

        return ray.put(value)

    def submit(self, worker: int, method: str, *arguments: Any) -> Any:
        """See remote.Workers."""
        return self._engines[worker].call.remote(method, *arguments)

    def result(self, call: Any, timeout_s: float) -> Any:
        """See remote.Workers; GetTimeoutError is a TimeoutError."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError

        try:
            return ray.get(call, timeout=timeout_s)
        except (RayActorError, ObjectLostError) as error:
            raise WorkerLost(f"it died ({brief(error)})") from None

    def kill(self, worker: int) -> None:
        """See remote.Workers. Ray starts it again."""
        import ray

        ray.kill(self._engines[worker], no_restart=False)


# -- the cluster -----------------------------------------------------------------------------------


@contextmanager
def cluster(cfg: Config) -> Iterator[Needs]:
    """Connect to a cluster that has room for the run. Raises UserError naming what is missing, or
    the address.
    """
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    try:
        with _own_cluster(cfg) if cfg.ray.address == "local" else _other_cluster(cfg.ray.address):
            import ray

            total = ray.cluster_resources()
            yield Needs.of(cfg, total.get("CPU", 0.0), total.get("GPU", 0.0))
    finally:
        os.environ.clear()
        os.environ.update(before)
        if _in_main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init sets one of its own


@contextmanager
def _own_cluster(cfg: Config) -> Iterator[None]:
    """A cluster of this run's own: on loopback only, behind a token, and gone without a trace
    afterwards.
    """
    cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    found = Needs.of(cfg, cpus, gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // (found.trainers + found.engines))))
    with private_folder() as folder:
        import ray

        if ray._private.ray_constants.ENABLE_RAY_CLUSTER:
            raise UserError(
                "ray.address=local: ray was imported before, with settings that listen on every "
                "interface; start a new process"
            )
        size: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "object_store_memory": store_bytes(cfg),
        }
        size |= {"include_dashboard": False, "logging_level": logging.ERROR}
        try:
            for attempt in range(START_ATTEMPTS):
                try:
                    ray.init("local", **size, _node_ip_address="127.0.0.1", _temp_dir=str(folder))
                    break
                # of no kind of its own; a machine may be too busy for the 30 s that Ray waits
                except Exception as error:
                    ray.shutdown()
                    if attempt == START_ATTEMPTS - 1:
                        raise StoppedError(
                            f"Ray does not start: {' '.join(str(error).split())[:300]}"
                        ) from error
            yield
        finally:
            ray.shutdown()


@contextmanager
def _other_cluster(address: str) -> Iterator[None]:
    """A cluster that somebody else started, and that stays."""
    host, port = find_cluster(address)
    # listens on loopback alone, as the one above
    if host.startswith(LOOPBACK) and not answers(own_address(), port):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ |= {"RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0", "RAY_NUM_REDIS_GET_RETRIES": "3"}
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(
            f"{host}:{port}", logging_level=logging.ERROR, runtime_env={"env_vars": passed_on()}
        )
    except (ConnectionError, RuntimeError, ValueError, RayError, SystemExit) as error:
        why = " ".join(str(error.__cause__ or error).split())
        token = (
            "it wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file "
            "that holds it"
        )
        raise UserError(
            f"ray.address={address}: {token if 'uthenticat' in why else why[:300]}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


# -- the run ---------------------------------------------------------------------------------------


def launch(cfg: Config, train_rank: Callable[..., Path]) -> Path:
    """Train by actors; returns the run's folder. `train_rank` is what each training process does.

    Raises UserError naming what the cluster lacks, whatever a rank stops at, StoppedError naming
    the actor that died once too often, and Preempted once the ranks have saved after SIGTERM.
    """
    if not cfg.ray.bind.startswith(LOOPBACK):
        say(
            f"warning: ray.bind={cfg.ray.bind}: training ranks meet at this address, and whoever "
            "reaches it can talk to them"
        )
    with cluster(cfg) as needs:
        run = _Run(cfg, train_rank, needs)
        try:
            return run.to_the_end()
        finally:
            run.close()


class _Run:
    """The actors of a run."""

    def __init__(self, cfg: Config, train_rank: Callable[..., Path], needs: Needs) -> None:
        import ray
        from ray.util.placement_group import placement_group, placement_group_table

        self.cfg, self.train_rank, self.needs = cfg, train_rank, needs
        self.deaths: list[str] = []
        self.trainers: list[Any] = []
        self.places: list[Place] = []
        self.engine_places: list[Place] = []
        self.asked_to_stop = self.passed_on = 0  # SIGTERMs
        self._here = ray.get_runtime_context().get_node_id()
        if _in_main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        bundles = needs.bundles
        if f"node:{cfg.ray.bind}" in ray.cluster_resources():
            bundles[0][f"node:{cfg.ray.bind}"] = 0.001  # rank 0 goes where the ranks meet
        self._group = placement_group(bundles, strategy="PACK")
        if not self._group.wait(PLACE_SECONDS):
            free = ray.available_resources()
            raise UserError(
                f"deepspeed.ranks={needs.trainers} and ray.engines={needs.engines}: the cluster is "
                "too busy; "
                f"{free.get('CPU', 0):g} CPU cores and {free.get('GPU', 0):g} GPUs are free"
            )
        self._nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        self.engines = [
            self._start(EngineActor, f"engine {i}", needs.trainers + i, cfg)
            for i in range(needs.engines)
        ]
        self.engine_pids: list[int] = []
        self._pings: dict[int, Any] = {}
        self._pinged = 0.0

    def _start(self, kind: type[Actor], name: str, bundle: int, *arguments: Any) -> Any:
        """Start an actor in its place."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        engine = kind is EngineActor
        options = {
            "num_cpus": self.needs.cpus,
            "num_gpus": self.needs.engine_gpus if engine else self.needs.trainer_gpus,
            "max_restarts": self.cfg.ray.max_restarts if engine else 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            ),
        }
        return ray.remote(kind).options(**options).remote(name, os.getcwd(), *arguments)

    def to_the_end(self) -> Path:
        """Train; after a death, again from the last checkpoint. Returns the run's folder."""
        from ray.exceptions import RayActorError

        while True:
            try:
                path = self._watch(self._start_trainers())
            except RayActorError as error:
                self._end_trainers()
                self._note_death(f"an actor died while it started ({brief(error)})")
            else:
                if path is not None:
                    return path

    def _start_trainers(self) -> list[Any]:
        """Every rank anew. Returns the calls that end when they do."""
        size, bind = self.needs.trainers, self.cfg.ray.bind
        self.places = []
        self.trainers = [self._start(TrainerActor, f"rank {rank}", rank) for rank in range(size)]
        self.places = places = self._wait(
            [actor.place.remote(self._nodes[rank]) for rank, actor in enumerate(self.trainers)]
        )
        if not self.engine_pids:
            found = self._wait(
                [
                    actor.place.remote(self._nodes[size + number])
                    for number, actor in enumerate(self.engines)
                ]
            )
            self.engine_pids = [place.pid for place in found]
            self._describe("engine", found)
        self._describe("rank", places)
        nodes = [place.node for place in places]
        if len(set(nodes)) > 1 and bind.startswith(LOOPBACK):
            raise UserError(
                f"ray.bind={bind}: the training ranks are on {len(set(nodes))} machines, which "
                "this address does not join; set it to one of this machine that the others reach"
            )
        (port,) = self._wait([self.trainers[0].port.remote(bind)])
        if isinstance(port, ErrorMessage):
            raise port.error()
        workers = RayWorkers(self.engines) if self.engines else None
        calls = []
        for rank, actor in enumerate(self.trainers):  # with a GPU of its own, a rank sees no other
            local = (
                (0, 1)
                if self.needs.trainer_gpus
                else (nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank]))
            )
            calls.append(
                actor.run.remote(
                    self.cfg, self.train_rank, Launch(rank, size, *local, bind, port), workers
                )
            )
        return calls

    def _wait(self, calls: Sequence[Any]) -> list[Any]:
        """What actors that are starting answer. Raises StoppedError for one that does not,
        Preempted after SIGTERM.
        """
        import ray

        deadline = time.monotonic() + START_SECONDS
        waiting = list(calls)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            if self.asked_to_stop:
                raise Preempted(
                    "stopped on SIGTERM while processes were starting; run the same command to go "
                    "on"
                )
            if waiting and time.monotonic() > deadline:
                raise StoppedError(
                    f"{len(waiting)} of {len(calls)} actors did not start within "
                    f"{START_SECONDS:.0f} s"
                )
        return ray.get(list(calls))

    def _describe(self, role: str, places: Sequence[Place]) -> None:
        for number, place in enumerate(places):
            say(f"{role} {number}: process {place.pid} on {place.host}, {place.device}")

    def _watch(self, calls: Sequence[Any]) -> Path | None:
        """Until the ranks have ended. Returns the run's folder; None where they have to start
        again.
        """
        import ray
        from ray.exceptions import RayActorError

        running = {call: rank for rank, call in enumerate(calls)}
        ended: dict[int, Ended] = {}
        died: dict[int, str] = {}
        give_up = float("inf")
        while running and time.monotonic() < give_up:
            for call in ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)[0]:
                rank = running.pop(call)
                try:
                    ended[rank] = ray.get(call)
                except RayActorError as error:
                    died[rank] = f"died ({brief(error)})"
            if died or any(end.path is None and not end.stopped for end in ended.values()):
                give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
            self._pass_on_sigterm()
            self._check_engines()
        if died and self.asked_to_stop:
            raise Preempted(
                "stopped on SIGTERM before every rank had saved; run the same command to go on "
                "from the last checkpoint"
            )
        reason = verdict(ended, died, sorted(running.values()))
        if reason is None:
            return Path(ended[0].path or "")
        self._end_trainers()
        self._note_death(reason)
        return None

    def _check_engines(self) -> None:
        """Ask every engine who it is: one that is another process than before has died in
        between.
        """
        import ray
        from ray.exceptions import ActorDiedError, RayActorError

        if self.engines and time.monotonic() > self._pinged + PING_SECONDS:
            self._pinged = time.monotonic()
            for number, engine in enumerate(self.engines):
                if number not in self._pings:  # an engine that samples answers afterwards
                    self._pings[number] = engine.call.remote("state")
        answered = (
            ray.wait(list(self._pings.values()), num_returns=len(self._pings), timeout=0)[0]
            if self._pings
            else []
        )
        for number, ping in list(self._pings.items()):
            if ping not in answered:
                continue
            del self._pings[number]
            try:
                state = ray.get(ping)
            except ActorDiedError as error:
                self.deaths.append(brief(error))
                raise StoppedError(
                    f"engine {number} died and is not started again ({brief(error)}); "
                    f"{self._so_far()}"
                ) from None
            except RayActorError:
                continue  # it is being started again
            if isinstance(state, ErrorMessage):
                raise state.error()
            if state.pid != self.engine_pids[number]:
                before, self.engine_pids[number] = self.engine_pids[number], state.pid
                self._note_death(
                    f"engine {number} (process {before}) died; process {state.pid} stands in for it"
                )

    def _note_death(self, what: str) -> None:
        """Raises StoppedError where it is one too many."""
        self.deaths.append(what)
        if len(self.deaths) > self.cfg.ray.max_restarts:
            raise StoppedError(f"{what}; {self._so_far()}")
        say(f"warning: {what}; {self._so_far()}")

    def _so_far(self) -> str:
        return (
            f"death {len(self.deaths)} of this run, which survives "
            f"ray.max_restarts={self.cfg.ray.max_restarts}"
        )

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked_to_stop += 1

    def _pass_on_sigterm(self) -> None:
        """As many as came; a rank that gets a second one ends at once."""
        while self.passed_on < self.asked_to_stop:
            self.passed_on += 1
            for place in self.places:
                self._on_node(place, send, signal.SIGTERM)

    def _on_node(self, place: Place, function: Callable[..., bool], *arguments: Any) -> bool:
        """Do something to a process, where it is."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if place.node == self._here:
            return function(place.pid, place.started, *arguments)
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        try:
            call = (
                ray.remote(function)
                .options(num_cpus=0, scheduling_strategy=there)
                .remote(place.pid, place.started, *arguments)
            )
            return ray.get(call, timeout=NODE_SECONDS)
        except RayError:  # the machine itself is gone
            return True

    def _end_trainers(self) -> None:
        """All of them, for certain: a rank that lived on would hold the run's folder."""
        import ray

        for actor in self.trainers:
            ray.kill(actor, no_restart=True)
        for rank, place in enumerate(self.places):
            if not self._on_node(place, end_process, KILL_SECONDS):
                raise StoppedError(
                    f"rank {rank} (process {place.pid} on {place.host}) cannot be ended"
                )
        self.trainers, self.places = [], []

    def close(self) -> None:
        """End the actors and give back their places."""
        import ray
        from ray.util.placement_group import remove_placement_group

        time.sleep(LOG_SECONDS)
        self._end_trainers()
        for actor in self.engines:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self._group)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

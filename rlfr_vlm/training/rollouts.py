"""Where a step's batch comes from: sampled when it is needed, or while the step before trains."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from rlfr_vlm.batch import Collected
from rlfr_vlm.config import Config
from rlfr_vlm.data.stream import PromptSource
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import RolloutEngine
from rlfr_vlm.training.collect import collect
from rlfr_vlm.training.timing import timed


class Rollouts:
    """Graded batches, one per step.

    With `rollout.staleness=1` the batch of step s + 1 is sampled in a thread while step s trains,
    from the weights that step s started
    with: one step old when it is learnt from, and never older. `algorithm.importance_cap` corrects
        for that.
    """

    def __init__(
        self,
        cfg: Config,
        learner: Learner,
        engine: RolloutEngine,
        prompts: PromptSource,
        grader: Grader,
    ) -> None:
        self.cfg, self.learner, self.engine, self.prompts, self.grader = (
            cfg,
            learner,
            engine,
            prompts,
            grader,
        )
        self.ranks = learner.ranks
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future[tuple[Collected, dict[str, float]]] | None = None
        if cfg.rollout.staleness:
            self._thread = ThreadPoolExecutor(1, "rollouts")
            # a process group of the thread's own
            self.ranks = Ranks(self.ranks.rank, self.ranks.size, self.ranks.timeout_s)

    def next(self, step: int, clock: dict[str, float]) -> Collected:
        """The batch of this step; steps are asked for in order."""
        if self._ahead is not None:
            with timed("rollout_wait", clock):
                batch, spent = self._ahead.result()
            self._ahead = None
            clock |= spent
        else:
            self._load(clock)
            batch = self._collect(step, clock)
        if self._thread is not None and step < self.cfg.train.steps:
            self._load(clock)
            self.prompts.hold()
            self._ahead = self._thread.submit(self._timed, step + 1)
        else:
            self.prompts.release()
        return batch

    def _load(self, clock: dict[str, float]) -> None:
        problem: NonFiniteError | None = None
        with timed("sync", clock):
            try:
                self.engine.load_weights(self.learner.policy)
            # of this rank's weights: the others are about to sample
            except NonFiniteError as error:
                problem = error
        self.learner.ranks.agree(problem, "weight sync")
        faultpoint("sync")

    def _collect(self, step: int, clock: dict[str, float]) -> Collected:
        batch = collect(self.cfg, self.engine, self.prompts, self.grader, step, clock, self.ranks)
        self.engine.sleep()
        return batch

    def _timed(self, step: int) -> tuple[Collected, dict[str, float]]:
        spent: dict[str, float] = {}
        return self._collect(step, spent), spent

    def settle(self) -> None:
        """Wait for what is being sampled, so that the engine is free."""
        if self._ahead is not None:
            self._ahead.exception()

    def close(self) -> None:
        """Wait for the thread; what it sampled is lost, and is sampled again by a run that
        resumes.
        """
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

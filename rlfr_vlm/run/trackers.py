"""Curves of a run elsewhere than in its folder: TensorBoard, Weights & Biases and trackio behind
one writer.

`metrics.jsonl` is the record; these are copies of it to look at. None of them may stop a run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError

STATE_FILE = "trackers.json"  # in the run's folder: what W&B and trackio know of the run by
FLUSH_S = 1.0  # W&B's file is written out so often
LAG_S = {
    "wandb": 2 * FLUSH_S,
    "trackio": 1.0,
}  # what was written so long ago has reached the disk; trackio's queue waits half a second
FINISH_S = 120.0  # longest wait at the end for W&B's server
PACKAGES = {"wandb": "wandb", "trackio": "trackio"}  # TensorBoard comes with the package

Say = Callable[[str], None]


def check_recording(cfg: Config) -> None:
    """Raises UserError, naming what to install, where the packages of `train.trackers` or
    `train.rollout_format` are missing.
    """
    for name in cfg.train.trackers:
        package = PACKAGES.get(name)
        if package is not None and not _installed(package):
            raise UserError(
                f"train.trackers: {name} is not installed: pip install 'rlfr-vlm[trackers]', or "
                f"pip install {package}"
            )
    if cfg.train.rollout_format == "parquet" and not _installed("pyarrow"):
        raise UserError(
            "train.rollout_format=parquet needs pyarrow: pip install 'rlfr-vlm[data]', or pip "
            "install pyarrow"
        )


def _installed(package: str) -> bool:
    """A folder `wandb` that another run left here is no package, though it can be imported."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Tracker(Protocol):
    """One of the three."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a step. A step may have several calls, with different names."""
        ...

    def replay(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures that an earlier process wrote: those that did not arrive."""
        ...

    def event(self, step: int, title: str, text: str) -> None:
        """Something that a person should know."""
        ...

    def close(self, failed: bool) -> None:
        """Write out what is left."""
        ...


class Trackers:
    """All trackers of a run. One that breaks is left out, and said once."""

    def __init__(self, cfg: Config, step: int, say: Say, warn: Say) -> None:
        """Opens them. step: the last one that stays, 0 for a new run.

        After a kill, steps are written again with the same figures: W&B and trackio, which cannot
        take anything back, get each of them once (trackio may get those of the last second before
        it twice), and what it cost them from metrics.jsonl. After a roll-back the
        figures differ: they get another run, of the same group. Raises UserError for a project's
            name that is refused.
        """
        self.warn = warn
        folder = Path(cfg.output_dir)
        self._open: dict[str, Tracker] = {}
        for name in cfg.train.trackers:
            if name == "tensorboard":
                self._open[name] = TensorBoard(folder, step)
            else:
                memory = Memory(folder / STATE_FILE, name, step, cfg.monitors.roll_backs)
                self._open[name] = (WandB if name == "wandb" else Trackio)(cfg, memory, say, warn)
        for line in _metrics(folder) if step else []:
            self._each(partial(_replay, line.pop("step"), line))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a step, finite or not."""
        self._each(lambda tracker: tracker.write(step, metrics))

    def event(self, step: int, title: str, text: str) -> None:
        """A line on what happened: text in TensorBoard, an alert elsewhere."""
        self._each(lambda tracker: tracker.event(step, title, text))

    def close(self, failed: bool = False) -> None:
        """Write out what is left. failed: the run ends with an error."""
        self._each(lambda tracker: tracker.close(failed))
        self._open = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except _breakage(name) as error:
                del self._open[name]
                self.warn(
                    f"{name} is left out from here on: {error or type(error).__name__}; "
                    "metrics.jsonl goes on"
                )


def _replay(step: int, metrics: Mapping[str, float], tracker: Tracker) -> None:
    tracker.replay(step, metrics)


def _breakage(name: str) -> tuple[type[Exception], ...]:
    """What a tracker may fail with while a run goes on: its files, its connection, its process."""
    if name != "wandb":
        return (OSError,)
    import wandb

    return (OSError, wandb.Error)


class Memory:
    """What a tracker was told before this process began: the run's id there, and up to which step
    each figure is written.
    """

    def __init__(self, path: Path, name: str, step: int, branch: int) -> None:
        self._path, self._name, self._lag = path, name, LAG_S[name]
        self._version, self._waiting, self._closed = 0, False, False
        state = _read(path).get(name)
        self.known = step > 0 and isinstance(state, dict) and state.get("branch") == branch
        self._state: dict[str, Any] = (
            state
            if self.known and isinstance(state, dict)
            else {"id": uuid.uuid4().hex[:12], "branch": branch, "rows": 0, "last": {}}
        )
        with _state_file:
            self._save(json.dumps(self._state))

    @property
    def id(self) -> str:
        """Of the run, where the tracker has ids."""
        return self._state["id"]

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return self._state["rows"]

    def run_name(self, folder: Path) -> str:
        """The output folder's name, numbered after a roll-back."""
        name = folder.resolve().name
        return name if not self._state["branch"] else f"{name} ({self._state['branch'] + 1})"

    def fresh(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those figures of a step that are not written yet."""
        return {
            name: value
            for name, value in metrics.items()
            if step > self._state["last"].get(name, 0)
        }

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """They are, now, in a row of their own. The file says so when they have reached the
        disk.
        """
        self._state["rows"] += 1
        self._note(step, metrics)

    def first_time(self, step: int, title: str) -> bool:
        """Whether an event of a step is new; from now on it is not."""
        found = self.fresh(step, {f"event: {title}": 0.0})
        self._note(step, found)
        return bool(found)

    def _note(self, step: int, names: Iterable[str]) -> None:
        with _state_file:
            self._state["last"] |= dict.fromkeys(names, step)
            self._version += 1
            if not self._waiting:
                self._wait()

    def _wait(self) -> None:
        """Write the state as it is now when it is true."""
        self._waiting = True
        later = threading.Timer(self._lag, self._settled, (self._version, json.dumps(self._state)))
        later.daemon = True
        later.start()

    def _settled(self, version: int, state: str) -> None:
        with _state_file:
            if not self._closed:
                self._save(state)
                self._waiting = False
                if self._version > version:
                    self._wait()

    def close(self) -> None:
        """Everything has reached the disk."""
        with _state_file:
            self._closed = True
            self._save(json.dumps(self._state))

    def _save(self, state: str) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**_read(self._path), self._name: json.loads(state)}))
        temporary.replace(self._path)


_state_file = threading.RLock()  # trackers share it, and each has a timer


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, none of them after the step that the run goes on from."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class TensorBoard:
    """Event files in `tb/`. What a restart takes back is purged by step."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tb"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a kill costs nothing

    def replay(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""

    def event(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        self._writer.add_text("events", f"**{title}** {text}", step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """See Tracker."""
        self._writer.close()


class WandB:
    """A run of W&B, files in `wandb/`. Without a key, or without a connection at the start, it is
    offline; it never asks for anything.

    Its own step counts rows, since it takes none twice; the axis of every chart is the figure
    `step`.
    """

    def __init__(self, cfg: Config, memory: Memory, say: Say, warn: Say) -> None:
        import wandb

        self._wandb, self._memory = wandb, memory
        folder = Path(cfg.output_dir)
        silent = wandb.Settings(silent=True, console="off")  # it would take over the terminal
        settings = wandb.Settings(
            silent=True,
            console="off",
            finish_timeout=FINISH_S,
            x_transaction_log_flush_interval=FLUSH_S,
        )
        given: dict[str, Any] = {
            "project": cfg.train.project,
            "name": memory.run_name(folder),
            "group": folder.resolve().name,
            "id": memory.id,
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR", str(folder)),
            "config": cfg.model_dump(mode="json"),
            "settings": settings,
        }
        # that of WANDB_MODE or of `wandb offline`
        mode: Any = wandb.setup(settings=silent).settings.mode
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                say("W&B: no API key, so the run is kept offline")
                mode = "offline"
            self._run = wandb.init(mode=mode, **given)
        except wandb.Error as error:
            warn(
                "W&B does not answer, so the run is kept offline: "
                f"{' '.join(str(error).split())[:300]}"
            )
            mode = "offline"
            wandb.teardown()  # its process still holds the run's id
            self._run = wandb.init(mode="offline", **given)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            say(f"W&B: send it with `wandb sync {Path(self._run.dir).parent}`")
        elif mode == "online":
            say(f"W&B: {self._run.url}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        fresh = self._memory.fresh(step, metrics)
        if fresh:
            self._run.log({"step": step, **fresh}, step=self._memory.rows, commit=True)
            self._memory.add(step, fresh)

    replay = write

    def event(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        if self._memory.first_time(step, title):
            self._run.alert(title=title, text=f"step {step}: {text}", wait_duration=0)

    def close(self, failed: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=int(failed))
        self._memory.close()


class Trackio:
    """A run of trackio, in `trackio/` unless TRACKIO_DIR or a Space says otherwise. It warns of its
    failures itself and raises none.
    """

    def __init__(self, cfg: Config, memory: Memory, say: Say, warn: Say) -> None:
        # read when it is imported
        os.environ.setdefault("TRACKIO_DIR", str(Path(cfg.output_dir).resolve() / "trackio"))
        import trackio
        from trackio.utils import TRACKIO_DIR

        self._trackio, self._memory = trackio, memory
        name = memory.run_name(Path(cfg.output_dir))
        try:
            with redirect_stdout(io.StringIO()):  # standard output is for what the command returns
                self._run = trackio.init(
                    project=cfg.train.project,
                    name=name,
                    group=Path(cfg.output_dir).resolve().name,
                    config=cfg.model_dump(mode="json"),
                    resume="allow" if memory.known else "never",
                    embed=False,
                )
        except ValueError as error:
            raise UserError(f"train.project: trackio refuses it: {error}") from None
        say(
            f"trackio: look at it with `TRACKIO_DIR={TRACKIO_DIR} trackio show --project "
            f"{cfg.train.project}`"
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        fresh = self._memory.fresh(step, metrics)
        if fresh:
            self._run.log(fresh, step=step)
            self._memory.add(step, fresh)

    replay = write

    def event(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        if self._memory.first_time(step, title):
            with redirect_stdout(io.StringIO()):
                self._run.alert(title, text, step=step)

    def close(self, failed: bool) -> None:
        """See Tracker."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()
        self._memory.close()

"""A reward function of the user's own, in the shape of TRL, verl, EasyR1 or OpenRLHF."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlfr_vlm.errors import UserError

if TYPE_CHECKING:
    from rlfr_vlm.types import Rollout

REASONS_SHOWN = 3


@dataclass(frozen=True)
class CustomScore:
    """What a user's function says of one response."""

    reward: float | None  # None: not gradable
    correct: bool | None = None  # None: the built-in grader decides
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = "the reward function returned None"  # why it is not gradable


@functools.cache
def load_reward_function(spec: str) -> Callable[[Sequence[Rollout]], list[CustomScore]]:
    """Load `file.py:function` and adapt it from one of the four shapes in use, told apart by the
    names of its parameters.

    TRL       f(prompts, completions, **columns) -> list of float or None; both are chat messages,
              columns are lists
    verl      compute_score(data_source, solution_str, ground_truth, extra_info) -> float, or dict
              with `score` and maybe `acc`
    EasyR1    compute_score(reward_inputs) -> list of dict with `overall` and maybe `accuracy`; or
              one for one (its REWARD_TYPE `sequential`)
    OpenRLHF  reward_func(queries, prompts, labels) -> rewards, or dict with `rewards` and maybe
              `extra_logs` or other columns

    Columns are answer (also as solution, ground_truth, label), id, data_source and those of the row
    that are none of ours. Raises UserError naming the file and function if it cannot be loaded or
    fits none of these.
    """
    function = _UserFunction.load(spec)
    parameters = function.signature.parameters.values()
    names = [parameter.name for parameter in parameters]
    for marker, shape in (
        ("completions", _trl_scores),
        ("solution_str", _verl_scores),
        ("queries", _openrlhf_scores),
    ):
        if marker in names:
            return functools.partial(shape, function)
    if (
        sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in parameters
        )
        == 1
    ):
        return functools.partial(_easyr1_scores, function)
    raise UserError(
        f"reward.function {spec}: its parameters ({', '.join(names)}) are those of none of "
        "f(prompts, completions, ...) as in TRL, f(data_source, solution_str, ground_truth, "
        "extra_info) as in verl, f(reward_inputs) as in EasyR1, f(queries, prompts, labels) as in "
        "OpenRLHF"
    )


def _file_and_name(spec: str) -> tuple[Path, str]:
    """The two halves of `file.py:function`. Raises UserError where it is none, or there is no such
    file.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise UserError(f"reward.function {spec}: expected `file.py:function`")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"reward.function {spec}: there is no file {path}")
    return path, name


@functools.cache
def reward_digest(spec: str) -> str:
    """sha256 of the file that a reward function is loaded from, as this process first saw it.
    Raises UserError where there is none.
    """
    return hashlib.sha256(_file_and_name(spec)[0].read_bytes()).hexdigest()


def _trl_scores(function: _UserFunction, rollouts: Sequence[Rollout]) -> list[CustomScore]:
    rows = [_columns(rollout) for rollout in rollouts]
    given = {name: [row.get(name) for row in rows] for row in rows for name in row}
    given["prompts"] = [list(rollout.prompt.prompt.messages) for rollout in rollouts]
    given["completions"] = [
        [{"role": "assistant", "content": rollout.text}] for rollout in rollouts
    ]
    given["completion_ids"] = [list(rollout.token_ids) for rollout in rollouts]
    values = function.per_response(function(given, rollouts), rollouts)
    return [
        function.score(value, "", "", rollout)
        for value, rollout in zip(values, rollouts, strict=True)
    ]


def _verl_scores(function: _UserFunction, rollouts: Sequence[Rollout]) -> list[CustomScore]:
    scores = []
    for rollout in rollouts:
        prompt = rollout.prompt.prompt
        own = prompt.extra.get("extra_info")
        given = {
            "data_source": prompt.data_source,
            "solution_str": rollout.text,
            "ground_truth": prompt.answer,
            "extra_info": {
                **prompt.extra,
                **(own if isinstance(own, Mapping) else {}),
                "id": prompt.id,
            },
        }
        scores.append(function.score(function(given, [rollout]), "score", "acc", rollout))
    return scores


def _easyr1_scores(function: _UserFunction, rollouts: Sequence[Rollout]) -> list[CustomScore]:
    inputs = [
        {**_columns(rollout), "response": rollout.text, "response_length": len(rollout.token_ids)}
        for rollout in rollouts
    ]
    name = next(iter(function.signature.parameters))
    if name == "reward_input" or function.function.__globals__.get("REWARD_TYPE") == "sequential":
        values = [
            function({name: one}, [rollout]) for one, rollout in zip(inputs, rollouts, strict=True)
        ]
    else:
        values = function.per_response(function({name: inputs}, rollouts), rollouts)
    return [
        function.score(value, "overall", "accuracy", rollout)
        for value, rollout in zip(values, rollouts, strict=True)
    ]


def _openrlhf_scores(function: _UserFunction, rollouts: Sequence[Rollout]) -> list[CustomScore]:
    prompts = [_chatml(rollout) for rollout in rollouts]
    given = {
        "queries": [
            prompt + rollout.text for prompt, rollout in zip(prompts, rollouts, strict=True)
        ],
        "prompts": prompts,
        "labels": [rollout.prompt.prompt.answer for rollout in rollouts],
    }
    result = function(given, rollouts)
    if not isinstance(result, Mapping):
        result = {"rewards": result}
    if "rewards" not in result:
        raise UserError(
            f"reward.function {function.spec}: the dict that it returned has no `rewards`: "
            f"{sorted(result)}"
        )
    others = {
        name: values for name, values in result.items() if name.endswith("_rewards")
    }  # lmm-r1, MM-EUREKA, RLFR: accuracy_rewards
    columns = {"rewards": result["rewards"], **others, **(result.get("extra_logs") or {})}
    columns = {name: function.per_response(values, rollouts) for name, values in columns.items()}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(rollouts))]
    accuracy = next(
        (name for name in ("acc", "accuracy", "accuracy_rewards") if name in columns), "accuracy"
    )
    return [
        function.score(row, "rewards", accuracy, rollout)
        for row, rollout in zip(rows, rollouts, strict=True)
    ]


def _columns(rollout: Rollout) -> dict[str, Any]:
    """The row of the data set for a user's function, the gold answer under each of its usual
    names.
    """
    prompt = rollout.prompt.prompt
    gold = dict.fromkeys(("answer", "solution", "ground_truth", "label"), prompt.answer)
    return {**gold, "id": prompt.id, "data_source": prompt.data_source, **prompt.extra}


def _chatml(rollout: Rollout) -> str:
    """The prompt as text with Qwen's turn marks, at which functions written for OpenRLHF split; a
    picture is one placeholder.
    """
    turns = []
    for message in rollout.prompt.prompt.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(
            part["text"]
            if part["type"] == "text"
            else "<|vision_start|><|image_pad|><|vision_end|>"
            for part in parts
        )
        turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class _UserFunction:
    """A function out of a user's file. What goes wrong in it or with its result is a UserError that
    names function and row.
    """

    spec: str
    function: Callable[..., Any]
    signature: inspect.Signature

    @classmethod
    def load(cls, spec: str) -> _UserFunction:
        """Import it from `file.py:function`."""
        path, name = _file_and_name(spec)
        reward_digest(spec)
        module_spec = importlib.util.spec_from_file_location(f"rlfr_vlm_reward_{path.stem}", path)
        assert module_spec and module_spec.loader  # the name ends in .py
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses look their module up
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"reward.function {spec}: {path} cannot be loaded: {_describe(error)}"
            ) from error
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            found = [
                n
                for n, value in vars(module).items()
                if inspect.isfunction(value) and not n.startswith("_")
            ]
            raise UserError(
                f"reward.function {spec}: no function `{name}` in {path} (functions there: "
                f"{', '.join(found) or 'none'})"
            )
        return cls(spec, function, inspect.signature(function))

    def __call__(self, given: dict[str, Any], rollouts: Sequence[Rollout]) -> Any:
        """Call it with those of the given arguments that it takes."""
        kinds = {name: parameter.kind for name, parameter in self.signature.parameters.items()}
        positional = [
            given[name]
            for name, kind in kinds.items()
            if kind is inspect.Parameter.POSITIONAL_ONLY and name in given
        ]
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
        named = {name: value for name, value in given.items() if name in kinds or takes_any}
        named = {
            name: value
            for name, value in named.items()
            if kinds.get(name) is not inspect.Parameter.POSITIONAL_ONLY
        }
        try:
            self.signature.bind(*positional, **named)
        except TypeError as error:
            raise UserError(
                f"reward.function {self.spec}: {error}; it can be given {', '.join(given)}"
            ) from None
        try:
            return self.function(*positional, **named)
        except Exception as error:
            ids = list(dict.fromkeys(rollout.prompt.prompt.id for rollout in rollouts))
            rows = ", ".join(ids[:REASONS_SHOWN]) + (", ..." if len(ids) > REASONS_SHOWN else "")
            raise UserError(
                f"reward.function {self.spec} failed on row{'s' * (len(ids) > 1)} {rows}: "
                f"{_describe(error)}"
            ) from error

    def per_response(self, values: Any, rollouts: Sequence[Rollout]) -> list[Any]:
        """One value per response out of a list, array or tensor."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != len(rollouts):
            got = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
            raise UserError(
                f"reward.function {self.spec}: expected {len(rollouts)} values, one per response, "
                f"got {got}"
            )
        return list(values)

    def score(self, value: Any, reward: str, accuracy: str, rollout: Rollout) -> CustomScore:
        """A score out of a number, or of a dict with the named keys (`accuracy` may be absent); its
        other numbers become parts.

        Where one of them is NaN or an infinity the response is not gradable.
        """
        if not isinstance(value, Mapping):
            return self._score(self._number(value, rollout))
        if reward not in value:
            raise UserError(
                f"reward.function {self.spec}: its dict for row {rollout.prompt.prompt.id} has no "
                f"`{reward}`: {sorted(value)}"
            )
        given, verified = (
            self._number(value[reward], rollout),
            self._number(value.get(accuracy), rollout),
        )
        parts = {
            name: float(part)
            for name, part in value.items()
            if name != reward and isinstance(part, (int, float))
        }
        return self._score(given, verified, parts)

    def _score(
        self,
        reward: float | None,
        accuracy: float | None = None,
        parts: Mapping[str, float] | None = None,
    ) -> CustomScore:
        numbers = {"reward": reward, "accuracy": accuracy, **(parts or {})}
        if broken := [
            f"{name}={number}"
            for name, number in numbers.items()
            if number is not None and not math.isfinite(number)
        ]:
            return CustomScore(None, reason=f"the reward function returned {', '.join(broken)}")
        return CustomScore(reward, None if accuracy is None else accuracy > 0.5, dict(parts or {}))

    def _number(self, value: Any, rollout: Rollout) -> float | None:
        """A float, or None for None. Raises UserError for what is no number."""
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError):
            raise UserError(
                f"reward.function {self.spec}: {value!r} for row {rollout.prompt.prompt.id} is no "
                "number"
            ) from None


def _describe(error: Exception) -> str:
    """Type, message and line of code: the command line prints no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"

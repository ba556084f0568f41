"""What stands between VLMEvalKit and the answers of a model, a judge's reply that does not come,
and this machine (see `vlm_process`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlfr_vlm.evaluation.server.endpoint import ChatRequest, Endpoint, Failure

GUARDS = 1  # version of what is here, part of the protocol
FAILED = "Failed to obtain answer via API."


class Lost(BaseException):
    """A row needs a judge's word and did not get it. No Exception: nobody's `except` may turn it
    into a verdict.
    """


class Judging:
    """The judge of one scoring: what it said, by row, kept on disk, and the rows that it left
    without a word.
    """

    def __init__(self, endpoint: Endpoint | None, path: Path, rows: Mapping[str, str]) -> None:
        self.endpoint, self.path, self.rows = endpoint, path, rows
        self.known: dict[str, str] = {}
        self.lock = threading.Lock()
        self.begin()
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            self.known.update(record.get("said", {}))
            for key in record.get("forgotten", ()):
                self.known.pop(key, None)

    def begin(self) -> None:
        """A new pass."""
        self.lost: dict[str, str] = {}
        self.said: dict[str, list[tuple[str, str]]] = {}
        self.turns: Counter[tuple[str | None, str]] = Counter()

    def ask(self, messages: list[dict[str, Any]], temperature: float, max_tokens: int) -> str:
        """The judge's words. Raises Lost."""
        row = asking_row(self.rows)
        if self.endpoint is None:
            raise self.lose(row, "VLMEvalKit's rules do not decide, and there is no judge")
        text = json.dumps([self.endpoint.model, messages, temperature, max_tokens])
        with self.lock:
            self.turns[row, text] += 1
            key = hashlib.sha256(f"{row}|{self.turns[row, text]}|{text}".encode()).hexdigest()
        if key not in self.known:
            request = ChatRequest(messages, temperature=temperature, max_tokens=max_tokens)
            _, outcome = next(iter(self.endpoint.chat([request])))
            if isinstance(outcome, Failure) or not outcome.text.strip():
                raise self.lose(
                    row,
                    f"{outcome.kind}: {outcome.message}"
                    if isinstance(outcome, Failure)
                    else "empty reply",
                )
            self.write({"said": {key: outcome.text.strip()}})
            self.known[key] = outcome.text.strip()
        self.said.setdefault(row or "", []).append((key, self.known[key]))
        return self.known[key]

    def lose(self, row: str | None, reason: str) -> Lost:
        """No verdict on this row: what was said about it does not count, and is asked again another
        time.
        """
        with self.lock:
            self.lost[row or ""] = reason
        if keys := [key for key, _ in self.said.pop(row or "", ())]:
            self.write({"forgotten": keys})
            for key in keys:
                self.known.pop(key, None)
        return Lost(reason)

    def write(self, record: dict[str, Any]) -> None:
        """Append; the line end comes first, so that a torn line harms no other."""
        with self.lock, self.path.open("a") as file:
            file.write("\n" + json.dumps(record))


class StandIn:
    """What VLMEvalKit takes for its judge's client."""

    def __init__(
        self,
        judging: Judging,
        max_tokens: int = 2048,
        temperature: float = 0.0,
        system_prompt: str | None = None,
        **_: Any,
    ) -> None:
        self.judging, self.max_tokens, self.temperature, self.system_prompt = (
            judging,
            max_tokens,
            temperature,
            system_prompt,
        )
        self.fail_msg, self.model = FAILED, "judge"

    def working(self) -> bool:
        """Probed before it came here."""
        return True

    def generate(
        self,
        message: Any,
        temperature: float | None = None,
        max_tokens: int | None = None,
        **_: Any,
    ) -> str:
        """The judge's words on a text, or on parts of text."""
        parts = (
            [message]
            if isinstance(message, str)
            else [p if isinstance(p, str) else p["value"] for p in message]
        )
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages = [*system, {"role": "user", "content": "\n".join(parts)}]
        return self.judging.ask(
            messages,
            self.temperature if temperature is None else temperature,
            max_tokens or self.max_tokens,
        )


def asking_row(rows: Mapping[str, str]) -> str | None:
    """The row that VLMEvalKit is at: the nearest caller's variable that has an `index` among the
    rows.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        for value in list(frame.f_locals.values()):
            if (
                hasattr(value, "keys")
                and not isinstance(value, type)
                and "index" in value
                and str(value["index"]) in rows
            ):
                return str(value["index"])
    return None


OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
UNREADABLE = (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError)


def arithmetic(source: Any) -> Any:
    """What `eval` makes of a literal or of arithmetic on numbers. Raises ValueError, or another of
    UNREADABLE, for anything else.
    """
    if not isinstance(source, str):
        raise TypeError("only text is read")
    tree = ast.parse(source.strip(), mode="eval").body
    try:
        return ast.literal_eval(tree)
    except ValueError:
        return _number(tree)


def _number(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_number(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = _number(node.left), _number(node.right)
        if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 64):
            raise ValueError("too large a power")
        return OPERATIONS[type(node.op)](left, right)
    raise ValueError("neither a literal nor arithmetic on numbers")


def guarded(builtin: Callable[..., Any], instead: Callable[[Any], Any]) -> Callable[..., Any]:
    """`eval` or `exec`, with something else in its place for VLMEvalKit; sympy may make numbers
    with it, which is how it reads their text.
    """

    def careful(source: Any, /, *scope: Any, **more: Any) -> Any:
        caller = sys._getframe(1)
        package = str(caller.f_globals.get("__name__")).partition(".")[0]
        if package == "vlmeval":
            return instead(source)
        if (
            package in ("sympy", "latex2sympy2", "latex2sympy2_extended")
            and source != "from sympy import *"
        ):
            check_numbers(source)
        return builtin(source, *(scope or (caller.f_globals, caller.f_locals)), **more)

    return careful


def check_numbers(source: Any) -> None:
    """Raises PermissionError where the text is more than arithmetic on `Integer(..)` and its
    like.
    """
    for node in (
        ast.walk(ast.parse(source.strip(), mode="eval")) if isinstance(source, str) else [None]
    ):
        number = isinstance(node, ast.Name) and node.id in ("Integer", "Float", "Rational")
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if not (
            number
            or call
            or isinstance(
                node,
                ast.Expression
                | ast.Constant
                | ast.BinOp
                | ast.UnaryOp
                | ast.operator
                | ast.unaryop
                | ast.Load,
            )
        ):
            refuse(source)


def refuse(source: Any) -> None:
    """Raises PermissionError."""
    raise PermissionError("text of a model or a data set is not executed here")


def bounded_equal(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """MathVision's comparison: numbers here, short LaTeX there (a child process, killed after 30
    s), long text only where it is the same.
    """

    def is_equal(answer: Any, gold: Any) -> bool:
        answer, gold = str(answer).strip().lower(), str(gold).strip().lower()
        if answer == gold or max(len(answer), len(gold)) > 200:
            return answer == gold
        try:
            return abs(arithmetic(answer) - arithmetic(gold)) < 1e-6
        except UNREADABLE:
            return original(answer, gold)

    return is_equal


def with_text_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    """MathVista's check, which compares None with the gold text or list."""

    def post_check(line: Any, prefetch: bool = False) -> Any:
        if line["question_type"] == "multi_choice" or line["answer_type"] not in ("text", "list"):
            return original(line, prefetch)
        answer, gold = (
            str(line["prediction" if prefetch else "res"]).strip(),
            str(line["answer"]).strip(),
        )
        try:
            same = answer.lower() == gold.lower() or arithmetic(answer) == arithmetic(gold)
        except UNREADABLE:
            same = False
        return same and (answer if prefetch else True)

    return post_check


def with_an_answer(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """DynaMath's check, for which the empty text is part of every gold text, and which one answer
    of an odd type ends for all rows.
    """

    def auxeval(model: Any, line: Any) -> dict[str, Any]:
        try:
            found = original(model, line)
        except (AttributeError, TypeError):  # a short answer that is no text
            return {"parse": True, "extracted": "", "correct": False}
        empty = found["parse"] and not str(found["extracted"]).strip()
        return found | {"correct": False} if empty else found

    return auxeval


class NoDice:
    """`random` for multiple choice: where an option would be drawn for an answer that the judge
    could not match, the row has no verdict.
    """

    def __init__(self, judging: Judging) -> None:
        self.judging = judging

    def choice(self, options: Any) -> Any:
        """Raises Lost."""
        raise self.judging.lose(
            asking_row(self.judging.rows), "the judge named none of the options"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(random, name)

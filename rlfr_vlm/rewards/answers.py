r"""Find the final answer in a response and compare it with the gold answer: pure functions of untrusted text.

`extract_answer` is linear in its input and may run anywhere. `grade_answer` and `gold_problem` hand text to math-verify and sympy, where a
short answer (`9^{9^{9^{9}}}`) can take all time and memory: they run in the workers of `grader.Grader`, never in the trainer.

math-verify decides what is equal. Around it stand rules that it lacks: option letters and words match exactly (as products of symbols
`listen` equals `silent`), `42 or 43` is no answer, two units must agree (`12 cm` is not `12 m`), `43 = 42` is not 42, and numbers smaller
than its rounding step stay apart. Nothing is handed to eval, exec or sympy's parse_expr.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlfr_vlm.types import Verdict

Where = Literal["boxed", "tag", "text"]

MAX_TEXT = 20_000  # characters at the end of a response in which its answer is looked for
MAX_ANSWER = 2_000  # characters of an answer; a longer one is wrong: no gold answer comes near
MAX_GOLD = 1_000  # characters of a gold answer; a longer one is a solution, not an answer


# --- finding the answer -----------------------------------------------------------------------------------------------

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(r"(?i)\banswer(?:\s{1,3}is|\*{0,2}\s{0,3}:)")
_ITEM = re.compile(r"\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)|(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?%)?")
_JOINER = re.compile(r"[ \t]{0,3}(?:[,;/&]|or|and)[ \t]{0,3}(?:or|and)?[ \t]{0,3}")
_WORD = re.compile(r"(?<!\\)\b(?!or\b|and\b)[^\W\d_]{2,}")


def extract_answer(text: str, where: Where) -> str | None:
    r"""The final answer of a response, as written, or None.

    boxed: the last complete \boxed{...} or \fbox{...}; of boxes in a box, the outer one.
    tag: the last <answer>..</answer>, or the box that it holds.
    text: the tag, else the box, else what follows the last "answer is" or "answer:", else the last line where that is an expression or a
    name, else the last number or $formula$ with those joined to it ("42 or 43"; "2, 3 and 5").
    Reads the last MAX_TEXT characters, in linear time.
    """
    text = text[-MAX_TEXT:]
    box = _last_box(text)
    if where == "boxed":
        return box
    tag = _last_tag(text)
    if where == "tag" or tag is not None:
        return tag if tag is None else _last_box(tag) or tag
    if box is not None:
        return box
    return _after_mark(text) or _last_line(text)


def _last_box(text: str) -> str | None:
    """Content of the box that closes last: one pass with a stack of open braces (None for those of no box)."""
    stack: list[tuple[int, int] | None] = []
    found = None  # (box start, content start, content end, box end)
    for token in _BOX_TOKEN.finditer(text):
        kind = token.group()
        if kind == "{":
            stack.append(None)
        elif kind != "}":  # a box, or an escaped character
            stack += [token.span()] if kind.endswith("{") and len(kind) > 2 else []
        elif stack and (opened := stack.pop()):
            start, content = opened
            if found and found[0] >= content and not (text[content : found[0]] + text[found[3] : token.start()]).strip():
                found = (start, *found[1:3], token.end())  # filled by another box
            else:
                found = (start, content, token.start(), token.end())
    return text[slice(*found[1:3])].strip() if found else None


def _last_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def _after_mark(text: str) -> str | None:
    """What follows the last "answer is" or "answer:" on its line, or on the next line that says anything."""
    end = max((mark.end() for mark in _MARK.finditer(text)), default=len(text))
    return text[end:].strip(" \t\r\n:*").split("\n", 1)[0].strip(" \t\r*").removesuffix(".") or None


def _last_line(text: str) -> str | None:
    line = text.strip().rsplit("\n", 1)[-1].strip()
    is_expression = "$" not in line and not _WORD.search(line)
    is_name = len(line.split()) <= 4 and not any(c.isdigit() or c == "$" for c in line)
    if line and (is_expression or is_name):
        return line.removesuffix(".")
    items = list(_ITEM.finditer(text, max(0, len(text) - MAX_ANSWER)))
    if not items:
        return None
    first = len(items) - 1
    while first and _JOINER.fullmatch(text, items[first - 1].end(), items[first].start()):
        first -= 1
    return text[items[first].start() : items[-1].end()].strip()


def unwrap_gold(gold: str) -> str:
    r"""The answer in a gold column: in its \boxed{} or <answer>, after the last `####` (GSM8K), else the column itself."""
    gold = gold.strip()
    return _last_box(gold) or _last_tag(gold) or gold.rpartition("####")[2].strip()


# --- reading an answer ------------------------------------------------------------------------------------------------

# fmt: off
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "∕": "/", "±": r"\pm ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "²": "^2", "³": "^3", "°": r"^\circ ",
    "（": "(", "）": ")", "，": ",", "。": ".", "：": ":", "；": ";", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "ℝ": r"\mathbb{R}", "\n": " ", "\r": " ", "\t": " ",
})
_REWRITES = tuple((re.compile(pattern), by) for pattern, by in (
    (r"√ ?\(([^()]*)\)|√ ?(\d+|[a-z])", r"\\sqrt{\1\2}"),
    (r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox) ?\{([^{}]*)\}", r" \1 "),  # one in another
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\!|\\left\.|\\right\.|\\?[$€£¥]|\{,\}(?=\d)|\\displaystyle", ""),
    (r"\\(?:[,;: ]|q?quad(?![a-zA-Z])|left(?![a-zA-Z])|right(?![a-zA-Z]))|~", " "),
    (r"\\%|(?i: ?\bper ?cent\b)", "%"),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degrees?(?![a-zA-Z])", " degrees "),
    (r" degrees +(C|F)(?:elsius|ahrenheit)?(?![a-zA-Z])", r" degrees\1 "),
    (r"\*\*", "^"),
    (r" +\^", "^"),
    (r"(?<![\\A-Za-z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi|alpha|beta|theta)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    (r"(?<![\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\d.])", r"\1 \\times 10^{\2}"),
    (r"\^(-?\d\d+)", r"^{\1}"),
    (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(\d) +(?=\\frac ?\{?\d)", r"\1"),
    (r" {2,}", " "),
))
# fmt: on
_PROSE = re.compile(r"(?i)^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:(?:final|correct) )?(?:answer|option|choice) ?(?:is|:) ?:?")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_REPEATING = re.compile(r"(?<!\d)(\d{1,9})?\.(\d{0,9})\\(?:overline|bar) ?\{?(\d{1,9})\}?")
_CHOICE = re.compile(r"\(?([A-J])(?:\)?[.:)]?|\)?[.:)] ?(.+))")
_OTHER_CHOICE = re.compile(r"(?:^|[ ,(/&])[A-J](?:[.:),/&]| ?$| (?:or|and)\b)")
_HEDGE = re.compile(r"(?i)(?:(?<![a-z\\])(?:or|either|maybe|perhaps|possibly|probably|alternatively|not)|\\(?:lor|vee))(?![a-z])")
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+ +\d")  # math-verify adds them: it reads a mixed number
_COMMANDS = re.compile(r"\\(?:begin|end) ?\{[a-z*]+\}|\\[A-Za-z]+")


def _clean(answer: str) -> str:
    """The answer without delimiters, introduction, text wrappers, spacing commands and currency signs; Unicode signs and code as LaTeX."""
    answer = answer.translate(_SYMBOLS).strip("* ")
    answer = answer.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    for pattern, by in _REWRITES:
        answer = pattern.sub(by, answer)
    answer = _PROSE.sub("", answer.strip()).strip(" *").rstrip(".,; ")
    answer = _THOUSANDS.sub(lambda match: match.group().replace(" ", ""), answer)
    return _REPEATING.sub(_as_fraction, answer)


def _as_fraction(decimal: re.Match[str]) -> str:
    """0.1(6) repeating is (16 - 1) / 90."""
    whole, fixed, period = decimal.group(1) or "0", decimal.group(2), decimal.group(3)
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _hidden(text: str) -> bool:
    """Whether it holds control, zero-width, direction or surrogate characters: what is shown is not what is compared."""
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c not in "\n\r\t" for c in text)


def _same_text(a: str, b: str) -> bool:
    """Equal but for case and spaces (those between letters or digits count)."""
    first, second = (re.sub(r"(?<!\w) +| +(?!\w)", "", text).casefold() for text in (a, b))
    return first == second


def _choice(answer: str) -> str | None:
    """The option letter of `B`, `(B)`, `B.`, `B) 12 cm`; None for anything else, and where a second letter is offered."""
    match = _CHOICE.fullmatch(answer)
    return match.group(1) if match and not _OTHER_CHOICE.search(match.group(2) or "") else None


def _is_words(value: str) -> bool:
    """Whether it is text rather than mathematics: four letters in a row that are no command, or a letter beyond Latin and Greek."""
    return re.search(r"[^\W\d_]{4}|[^\W\d_\x00-\u03ff]", _COMMANDS.sub(" ", value)) is not None


def _hedges(answer: str) -> bool:
    """Whether more than one answer is offered (`42 or 43`, `42 43`) or one is taken back."""
    return _HEDGE.search(answer) is not None or _TWO_NUMBERS.search(answer) is not None


# --- units ------------------------------------------------------------------------------------------------------------

_UNIT_NAMES = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "in": "inch inche",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "s": "sec second", "min": "minute", "h": "hr hour", "g": "gm gram", "kg": "kilogram",
    "l": "liter litre", "ml": "milliliter millilitre", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "deg": "degree",
    "dollar": "usd",
}  # fmt: skip
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
_LAST_WORD = re.compile(r"(?P<glue>[\d)}]| )(?P<word>[A-Za-z]{1,20})(?P<power>\^\{?[23]\}?)?(?P<rest>/[A-Za-z]{1,20}(?:\^\{?[23]\}?)?)?$")


def _split_unit(answer: str, glued_letter: bool) -> tuple[str, str]:
    """(value, unit in one spelling or "") of `12 square cm`, `5 apples`, `90 degrees`, `3m/s`, `101_2`.

    A letter right behind the number (`3m`) is a unit only where `glued_letter` says so: it may be a variable.
    """
    if based := re.fullmatch(r"([0-9A-F]+)_ ?\{?(\d{1,2})\}?", answer):
        return based.group(1), f"base {based.group(2)}"
    value, words = answer, list[str]()
    while len(words) < 5 and (match := _LAST_WORD.search(value)):
        word = match["word"].lower()
        singular = word.removesuffix("s") if len(word) > 2 else word
        known = singular in _UNITS or bool(words)
        is_unit = (len(word) > 1 or glued_letter) and known if match["glue"] != " " else known or len(word) > 2
        value_left = value[: match.start("word")].strip()
        if not is_unit or not value_left or _HEDGE.fullmatch(word):
            break
        power = (match["power"] or "").translate({ord("{"): None, ord("}"): None})
        words.insert(0, _UNITS.get(singular, singular) + power + (match["rest"] or "").lower())
        value = value_left
    unit = " ".join(words).replace(" per ", "/")
    for prefix, power in (("square ", "^2"), ("sq ", "^2"), ("cubic ", "^3"), ("cu ", "^3")):
        if unit.startswith(prefix):
            unit = unit.removeprefix(prefix) + power
    return value, "" if unit.startswith("unit") else unit


# --- comparing --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _parse(value: str) -> Any | None:
    """What math-verify reads in it, or None."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify.parser import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off; our process limits stand in for them
    normalise = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    target = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalise)
    found = parse(f"${value}$", [target], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    return found[0] if found else None


def _equal(gold: Any, prediction: Any, percent: bool = False) -> bool:
    """math-verify's judgement of two parsed answers; with `percent`, 50 % is 50 as well as 0.5."""
    from math_verify.grader import verify

    same = verify(gold, prediction, timeout_seconds=None, allow_set_relation_comp=True)
    return same and (percent or not _far_apart(gold, prediction))


def _far_apart(a: Any, b: Any) -> bool:
    """Whether two constants differ by more than 1 %: math-verify rounds to 6 decimals, where 6.6e-34 equals 0."""
    try:
        x, y = complex(a.doit()), complex(b.doit())
    except (AttributeError, TypeError, ValueError, OverflowError):  # no constants
        return False
    return abs(x - y) > 0.01 * max(abs(x), abs(y))


def _other_sides_differ(gold: Any, prediction: str) -> bool:
    """Whether a number stands on some side of `43 = 42` that is not the gold one (math-verify reads the last side alone)."""
    sides = re.split(r"(?<![<>!\\:])=|\\approx(?![a-zA-Z])", prediction)
    numbers = [side for side in sides[:-1] if re.search(r"\d", side) and not re.search(r"[A-Za-z]", _COMMANDS.sub("", side))]
    return any((side := _parse(number.strip())) is None or not _equal(gold, side) for number in numbers)


def gold_problem(gold: str) -> str | None:
    """Why a gold answer cannot be graded against, or None."""
    gold = unwrap_gold(gold)
    if len(gold) > MAX_GOLD:
        return f"the gold answer has more than {MAX_GOLD} characters: a solution, not an answer"
    if _hidden(gold):
        return "the gold answer holds control or invisible characters"
    cleaned = _clean(gold)
    value, _ = _split_unit(cleaned, glued_letter=False)
    if not value:
        return "the gold answer is empty"
    if _choice(cleaned) or _is_words(value):
        return None
    if _TWO_NUMBERS.search(value):
        return f"the gold answer `{gold[:80]}` holds numbers with nothing between them"
    parsed = _parse(value)
    if parsed is None or str(parsed) in ("nan", "zoo"):
        return f"math-verify cannot read the gold answer `{gold[:80]}`"
    return None


def grade_answer(gold: str, prediction: str) -> Verdict:
    r"""Whether an extracted answer equals the gold one: correct | wrong, or error where the gold answer is unusable (`gold_problem`).

    May take unbounded time and memory, and raises what sympy raises: run it in a `Grader` worker.
    """
    if gold_problem(gold):
        return "error"
    if not prediction.strip() or len(prediction) > MAX_ANSWER or _hidden(prediction):
        return "wrong"
    gold, prediction = _clean(unwrap_gold(gold)), _clean(prediction)
    if _same_text(gold, prediction):
        return "correct"
    if letter := _choice(gold):
        return "correct" if _choice(prediction if len(prediction) > 3 else prediction.upper()) == letter else "wrong"
    gold_value, gold_unit = _split_unit(gold, glued_letter=False)
    if _is_words(gold_value) or (_hedges(prediction) and not _hedges(gold)):
        return "wrong"
    value, unit = _split_unit(prediction, glued_letter=not re.search(r"[A-Za-z]", _COMMANDS.sub("", gold_value)))
    if gold_unit and unit and gold_unit != unit:
        return "wrong"
    gold_parsed, parsed = _parse(gold_value), _parse(value)
    if parsed is None or ("=" not in gold_value and _other_sides_differ(gold_parsed, value)):
        return "wrong"
    return "correct" if _equal(gold_parsed, parsed, percent="%" in gold_value + value) else "wrong"

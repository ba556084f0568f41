r"""Find the final answer in a response and compare it with the gold answer: pure functions of
untrusted text.

`extract_answer` is linear in its input and may run anywhere. `grade_answer` and `gold_problem` hand
text to math-verify and sympy, where a short answer (`9^{9^{9^{9}}}`) can take all time and memory:
they run in the workers of `grader.Grader`, never in the trainer.

math-verify decides what is equal. Around it stand rules that it lacks: option letters and words
match exactly (as products of symbols `listen` equals `silent`), `42 or 43` is no answer, units are
converted (`12 cm` is 120 mm and not 12 m), `43 = 42` is not 42, `R - r` is not 0, inequalities are
the sets they describe, a list keeps its repeats, and numbers smaller than its rounding step stay
apart. Nothing is handed to eval, exec or sympy's parse_expr.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rlfr_vlm.rewards.extract import MAX_ANSWER, unwrap_gold

if TYPE_CHECKING:
    from rlfr_vlm.types import Verdict


MAX_DEPTH = 100  # brackets within brackets of an answer; a deeper one is wrong: it only keeps the parser busy
MAX_GOLD = 1_000  # characters of a gold answer; a longer one is a solution, not an answer


# --- finding the answer -----------------------------------------------------------------------------------------------


# --- reading an answer ------------------------------------------------------------------------------------------------

# fmt: off
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "∕": "/", "±": r"\pm ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "²": "^2", "³": "^3", "°": r"^\circ ",
    "（": "(", "）": ")", "，": ",", "。": ".", "：": ":", "；": ";", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "ℝ": r"\mathbb{R}", "\n": " ", "\r": " ", "\t": " ",
})
_WRAPPER = r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|mbox|underline|bold|boldsymbol|bm) ?\{([^{}]*)\}"
_REWRITES = tuple((re.compile(pattern), by) for pattern, by in (
    (r"√ ?\(([^()]*)\)|√ ?(\d+|[a-z])", r"\\sqrt{\1\2}"),
    (_WRAPPER, r" \1 "),
    (_WRAPPER, r" \1 "),  # one in another
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac ?(\d) (\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"(?<!\\)\\!|\\left\.|\\right\.|\{,\}(?=\d)|\\displaystyle|\\[bB]igg?[lrm]?(?![a-zA-Z])|\\(?:text)?color ?\{[a-z]+\}", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z])|left(?![a-zA-Z])|right(?![a-zA-Z]))|~", " "),
    (r"\{:\}", ":"),
    (r"\\(?:begin|end) ?\{(?:align|aligned|gather|gathered|split|equation)\*?\}|\\checkmark|✓", ""),
    (r"^\\\{ ?[a-zA-Z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?::|\||\\mid|\\vert)(?![a-zA-Z]) ?(.*[<>\\].*)\\\}$", r"\1"),
    (r"\.(\d*?)(\d)\2\2+(?:\\[lc]?dots|\.\.\.)", r".\1\\overline{\2}"),
    (r"(?<=[\d}]) *\( *([A-Za-z]{4,}(?: [A-Za-z]+)*) *\) *$", r" \1"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"_ ?\{ ?\\([a-zA-Z]+) ?\}", r"_{\1}"),
    (r"(?i)\b([ap])\. ?m\b\.?", r"\1m"),
    (r"^(-?) ?(?:\\?\$|USD ?) ?(\d[\d.,{}]*)$", r"\1\2 dollars"),
    (r"^(-?) ?€ ?(\d[\d.,{}]*)$", r"\1\2 euros"),
    (r"\\?[$€£¥]", ""),
    (r" ?¢", " cents"),
    (r"(?<=[a-zA-Z]) +([a-zA-Z]{1,3})\^ ?\{ ?- ?1 ?\} *$", r"/\1"),
    (r"(?<=[a-zA-Z]) +([a-zA-Z]{1,3})\^ ?\{ ?- ?([23]) ?\} *$", r"/\1^\2"),
    (r"\\%|(?i: ?\bper ?cent\b)", "%"),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degrees?(?![a-zA-Z])", " degrees "),
    (r" degrees +(C|F)(?:elsius|ahrenheit)?(?![a-zA-Z])", r" degrees\1 "),
    (r"\\((?:sin|cos|tan|cot|sec|csc) ?)[{(]? ?(\d+(?:\.\d+)?) +degrees ?[)}]?", r"\\\1(\\frac{\2\\pi}{180})"),
    (r" degrees *(?=[,)\\])", ""),  # of the elements of a list
    (r"\*\*", "^"),
    (r" +\^", "^"),
    (r"(?<![\\A-Za-z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi|alpha|beta|theta)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    (r"(?<![\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\d.])", r"\1 \\times 10^{\2}"),
    (r"\^(-?\d\d+)", r"^{\1}"),
    (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(\d) +(?=\\frac ?\{?\d)", r"\1"),
    (r"(?<=[(\[]) +| +(?=[)\]])", ""),
    # what math-verify misreads: the gamma function, constants in place of symbols, a derivative as a fraction, primes dropped
    (r"\\gamma(?![a-zA-Z])", r"\\vartheta "),
    (r"(?<![A-Za-z\\])[Ee](?=_)", r"\\varsigma"),
    (r"(?<![A-Za-z\\])[Ii](?=_)", r"\\varrho"),
    (r"\\lg(?![a-zA-Z])", r"\\log"),
    (r"\\frac ?\{d(?:\^\{?(\d)\}?)? ?\\?([a-zA-Z]+)\} ?\{d ?\\?([a-zA-Z])(?:\^\{?\d\}?)?\}", r"d_{\2\3\1}"),
    (r"(?<![A-Za-z\\])([A-Za-z])''", r"\1_{pp}"),
    (r"(?<![A-Za-z\\])([A-Za-z])'", r"\1_{p}"),
    (r" {2,}", " "),
))
# fmt: on
_PROSE = re.compile(
    r"(?i)^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:(?:final|correct) )?(?:answer|option|choice) ?(?:is|:) ?:?"
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_REPEATING = re.compile(r"(?<!\d)(\d{1,9})?\.(\d{0,9})\\(?:overline|bar|dot) ?\{?(\d{1,9})\}?")
_SIGNED_PAIR = re.compile(r"\((?=[^()]*,)([^()]*)\\pm ?([^()]*)\)")
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) )?\(?([A-J])(?:\)?[.:)]?|\)?[.:)] ?(?![+*/^=])(.+))"
)
_OTHER_CHOICE = re.compile(r"(?:^|[ ,(/&])[A-J](?:[.:),/&]| ?$| (?:or|and)\b)")
_HEDGE = re.compile(
    r"(?i)(?:(?<![a-z\\])(?:or|either|maybe|perhaps|possibly|probably|alternatively|not)|\\(?:lor|vee))(?![a-z])"
)
_OR_SIGN = re.compile(r" *(?:(?<![a-z\\])or(?![a-z])|\\(?:lor|vee)(?![a-z])) *")
_AND_SIGN = re.compile(r" *(?:(?<![a-z\\])and(?![a-z])|\\(?:land|wedge)(?![a-z])) *")
_RELATION = re.compile(r"[<>]|\\(?:[lg]eq?(?:slant)?|ne|neq)(?![a-z])")
_QUESTION = re.compile(
    r"(?i)(?:what|which|find|how|who|when|where|why|determine|compute|calculate|evaluate|solve|given|suppose|prove|show)\b"
)
_FILLER = re.compile(
    r"(?i)^(?:there (?:is|are|exists?) )?(?:(?:on|in|at) )?(?:an? |the )?|(?<=infinitely many) solutions?$|(?<=solution)s$"
)
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+ +\d")  # math-verify adds them: it reads a mixed number
_COMMANDS = re.compile(r"\\(?:begin|end|mathbb) ?\{[A-Za-z*]+\}|\\[A-Za-z]+")
_SUBSCRIPT = re.compile(r"_\{[^{}]*\}")
_NAME = re.compile(_COMMANDS.pattern + r"|[A-Za-z]")


def _clean(answer: str) -> str:
    """The answer without delimiters, introduction, text wrappers, spacing commands and currency
    signs; Unicode signs and code as LaTeX.
    """
    answer = answer.translate(_SYMBOLS).strip("* ")
    answer = answer.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    answer = re.sub(r"(?<!\\)\$([^$]*)(?<!\\)\$", r"\1", answer)
    for pattern, by in _REWRITES:
        answer = pattern.sub(by, answer)
    answer = _PROSE.sub("", answer.strip()).strip(" *").rstrip(r".,;\ ")
    answer = re.sub(r"^(?:=|\\approx(?![a-zA-Z])) *", "", answer)
    answer = _THOUSANDS.sub(lambda match: match.group().replace(" ", ""), answer)
    for _ in range(2):  # (0, \\pm 1) is two pairs, (\\pm 1, \\pm 1) four
        answer = _SIGNED_PAIR.sub(r"(\1+\2),(\1-\2)", answer)
    return _REPEATING.sub(_as_fraction, answer)


def _as_fraction(decimal: re.Match[str]) -> str:
    """0.1(6) repeating is (16 - 1) / 90."""
    whole, fixed, period = decimal.group(1) or "0", decimal.group(2), decimal.group(3)
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _hidden(text: str) -> bool:
    """Whether it holds control, zero-width, direction or surrogate characters: what is shown is not
    what is compared.
    """
    return any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c not in "\n\r\t"
        for c in text
    )


def _depth(text: str) -> int:
    """How deep its brackets of any kind are nested."""
    return max(itertools.accumulate((c in "([{") - (c in ")]}") for c in text), default=0)


def _same_text(a: str, b: str) -> bool:
    """Equal but for case and spaces (those between letters or digits count)."""
    first, second = (re.sub(r"(?<!\w) +| +(?!\w)", "", text).casefold() for text in (a, b))
    return first == second


def _same_words(a: str, b: str) -> bool:
    """Equal but for an article, `there is` and the number of `solutions`."""
    return _same_text(_FILLER.sub("", a), _FILLER.sub("", b))


def _choice(answer: str) -> tuple[str, str] | None:
    """Letter and text of an option: `B`, `(B)`, `B.`, `option B`, `B) 12 cm`; None for anything
    else, and where a second letter is offered.
    """
    match = _CHOICE.fullmatch(answer)
    return (
        (match[1], match[2] or "") if match and not _OTHER_CHOICE.search(match[2] or "") else None
    )


def _is_words(value: str) -> bool:
    """Whether it is text rather than mathematics: two words, four letters in a row that are no
    command, or a letter beyond Latin and Greek.
    """
    return (
        re.search(
            r"^[a-zA-Z]{2,} [a-zA-Z]{2,}$|[^\W\d_]{4}|[^\W\d_\x00-\u03ff]",
            _SUBSCRIPT.sub("", _COMMANDS.sub("|", value)),
        )
        is not None
    )


def _hedges(answer: str, may_join: bool) -> bool:
    """Whether more than one answer is offered (`42 or 43`, `42 43`) or one is taken back; `or` may
    join where the gold answer has many values.
    """
    answer = _OR_SIGN.sub(",", answer) if may_join else answer
    return _HEDGE.search(answer) is not None or _TWO_NUMBERS.search(answer) is not None


def _is_plural(value: str) -> bool:
    """Whether it holds more than one value: `1, 2`, `{1, 2}`, `x=1 or x=2`, `\\pm 3`, but not the
    one pair `(1, 2)`.
    """
    return (
        len(_elements(re.sub(r"^(?:[a-z] ?\\in ?)?\\\{(.*)\\\}$", r"\1", value))) > 1
        or "\\pm" in value
    )


def _elements(value: str) -> list[str]:
    """The elements of a bare list: what separators outside all brackets part."""
    value = _AND_SIGN.sub(",", _OR_SIGN.sub(",", value))
    depth, cuts = 0, [-1]
    for position, character in enumerate(value):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ",;":
            cuts.append(position)
    return [
        value[start + 1 : end].strip()
        for start, end in zip(cuts, [*cuts[1:], len(value)], strict=True)
    ]


def _keep_case(gold: str, prediction: str) -> tuple[str, str]:
    """Both with the capitals renamed of letters that one of them has in both cases: math-verify
    reads R - r as 0.
    """
    used = [{name for name in _NAME.findall(text) if len(name) == 1} for text in (gold, prediction)]
    capitals = sorted(
        {name for names in used for name in names if name.isupper() and name.lower() in names}
    )
    free = [
        letter
        for letter in "qwzvujhkpstybcagnrxlmof"
        if not {letter, letter.upper()} & (used[0] | used[1])
    ]
    new = dict(zip(capitals, free, strict=False))
    gold, prediction = (
        _NAME.sub(lambda match: new.get(match[0], match[0]), text) for text in (gold, prediction)
    )
    return gold, prediction


# --- units ------------------------------------------------------------------------------------------------------------

# fmt: off
_UNIT_NAMES = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "in": "inch inche",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "g": "gm gram",
    "kg": "kilogram", "l": "liter litre", "ml": "milliliter millilitre", "n": "newton", "j": "joule", "w": "watt", "v": "volt",
    "deg": "degree", "rad": "radian", "dollar": "usd buck", "cent": "", "mph": "", "%": "",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
_SIZES = {  # in a base unit
    "m": "m", "cm": "1/100 m", "mm": "1/1000 m", "km": "1000 m", "in": "254/10000 m", "ft": "3048/10000 m", "yd": "9144/10000 m",
    "mi": "1609344/1000 m", "s": "s", "min": "60 s", "h": "3600 s", "day": "86400 s", "g": "g", "kg": "1000 g", "l": "l", "ml": "1/1000 l",
    "dollar": "dollar", "cent": "1/100 dollar",
}
# fmt: on
_RAW_LETTER = re.compile(r"[\d})~ ][a-z]\$?$")
_ONLY_WORDS = re.compile(r"[A-Za-z]{2,}\.?(?: [A-Za-z]+\.?)*")
_LAST_WORD = re.compile(
    r"(?P<glue>[\d)}]| )(?P<word>[A-Za-z]{1,20})(?P<power>\^\{?[23]\}?)?(?P<rest>/[A-Za-z]{1,20}(?:\^\{?[23]\}?)?)?$"
)


def _split_unit(answer: str, glued_letter: bool) -> tuple[str, str]:
    """(value, unit in one spelling or "") of `12 square cm`, `5 apples`, `90 degrees`, `3m/s`,
    `101_2`.

    A letter right behind the number (`3m`) is a unit only where `glued_letter` says so: it may be a
    variable.
    """
    if based := re.fullmatch(r"([0-9A-F]+)_ ?\{?(\d{1,2})\}?", answer):
        return based.group(1), f"base {based.group(2)}"
    if answer.endswith("%"):
        return answer.removesuffix("%").strip(), "%"
    value, words = answer, list[str]()
    while len(words) < 5 and (match := _LAST_WORD.search(value)):
        word = match["word"].lower()
        singular = word.removesuffix("s") if len(word) > 2 else word
        known = bool(words) or (
            singular in _UNITS if len(word) > 1 else match["word"] in "mshglLNJWV"
        )
        is_unit = (
            (len(word) > 1 or glued_letter) and known
            if match["glue"] != " "
            else known or len(word) > 2
        )
        value_left = value[: match.start("word")].strip()
        is_text = _ONLY_WORDS.fullmatch(value_left) or (
            value_left in "aA" and singular not in _UNITS
        )
        if not is_unit or is_text or _HEDGE.fullmatch(word):
            break
        power = (match["power"] or "").translate({ord("{"): None, ord("}"): None})
        words.insert(0, _UNITS.get(singular, singular) + power + (match["rest"] or "").lower())
        value = value_left
    unit = " ".join(words).replace(" per ", "/")
    for prefix, power in (("square ", "^2"), ("sq ", "^2"), ("cubic ", "^3"), ("cu ", "^3")):
        if unit.startswith(prefix):
            unit = unit.removeprefix(prefix) + power
    return value, "" if unit.startswith("unit") else unit.replace("mph", "mi/h")


def _size(unit: str) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    """(size, powers of base units) of `cm^2` or `km/h`; None for a unit whose size is not known."""
    size, powers = Fraction(1), Counter[str]()
    parts = unit.split("/")
    for sign, part in zip((1, -1), parts, strict=False):
        name, _, power = part.partition("^")
        known = _SIZES.get(_UNITS.get(name.removesuffix("s") if len(name) > 2 else name, ""))
        if known is None or len(parts) > 2:
            return None
        number, _, base = known.rpartition(" ")
        exponent = sign * int(power.strip("{}") or 1)
        size *= Fraction(number or 1) ** exponent
        powers[base] += exponent
    return size, tuple(sorted(powers.items()))


def _factors(gold_unit: str, unit: str) -> tuple[Any, ...]:
    """What to multiply a value in `unit` by to have it in `gold_unit`: one factor or, where a unit
    was left out, one of two; () if none can.
    """
    import sympy

    if gold_unit == unit:
        return (1,)
    degree = sympy.pi / 180
    left_out = {
        ("", "%"): (1, sympy.Rational(1, 100)),
        ("%", ""): (1, 100),
        ("", "deg"): (1, degree),
        ("deg", ""): (1, 1 / degree),
    }
    radians = {("rad", "deg"): (degree,), ("deg", "rad"): (1 / degree,)}
    if not gold_unit or not unit or (gold_unit, unit) in radians:
        return (left_out | radians).get((gold_unit, unit), (1,))
    gold_size, size = _size(gold_unit), _size(unit)
    if gold_size is None or size is None or gold_size[1] != size[1]:
        return ()
    ratio = size[0] / gold_size[0]
    return (sympy.Rational(ratio.numerator, ratio.denominator),)


# --- comparing --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _parse(value: str) -> Any | None:
    """What math-verify reads in it, or None."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify.parser import LatexExtractionConfig, parse

    # it warns that its timeouts are off; our process limits stand in for them
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    normalise = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    target = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalise)
    found = parse(
        f"${value}$",
        [target],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found:
        return None
    import sympy

    parsed: Any = found[0]
    if parsed.atoms(sympy.core.relational.Relational, sympy.Interval):
        return parsed  # `i = 5` is an index; the pair `(i, 2)` was read as an interval, which has to be real
    return parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})


def _equal(gold: Any, prediction: Any) -> bool:
    """math-verify's judgement of two parsed answers, corrected where its rounding to 6 decimals or
    its symbolic difference misses.
    """
    from math_verify.grader import verify

    if _far_apart(gold, prediction):
        return False
    return verify(
        gold, prediction, timeout_seconds=None, allow_set_relation_comp=True
    ) or _same_constant(gold, prediction)


def _far_apart(a: Any, b: Any) -> bool:
    """Whether two constants differ by more than 1 %: math-verify rounds to 6 decimals, where
    6.6e-34 equals 0.
    """
    try:
        x, y = complex(a.doit()), complex(b.doit())
    except (AttributeError, TypeError, ValueError, OverflowError):  # no constants
        return False
    return abs(x - y) > 0.01 * max(abs(x), abs(y))


def _same_constant(a: Any, b: Any) -> bool:
    """Whether two constants, not both rational, agree in 40 digits, or 13 where one holds a
    decimal: (1+i)^2 and 2i, 13^{0.5} and sqrt(13).
    """
    import sympy

    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (a, b)):
        return False
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return False
    try:
        distance = float(abs(sympy.N((a - b) / b, 60)))
    except (TypeError, ValueError, OverflowError):  # of infinities
        return False
    return distance < (1e-13 if a.has(sympy.Float) or b.has(sympy.Float) else 1e-40)


def _region(value: str) -> tuple[Any, set[Any]] | None:
    """(the reals, the variables) of `[0, 1)`, `|x| < 1`, `x < 1 or x > 2`, `x > 1 and x < 2`; None
    of what is no set of reals.
    """
    import sympy
    from sympy.core.relational import Relational

    parts = [
        [_parse(part.strip()) for part in _AND_SIGN.split(either)]
        for either in _OR_SIGN.split(value)
    ]
    regions, variables = list[Any](), set[Any]()
    for part in (part for both in parts for part in both):
        if isinstance(part, Relational | sympy.And) and not part.atoms(sympy.Eq):
            variables |= part.free_symbols
        elif not isinstance(part, sympy.Set) or part.atoms(Relational, sympy.Tuple):
            return None
    if len(variables) > 1:
        return None
    try:
        for both in parts:
            sets = [
                part
                if isinstance(part, sympy.Set)
                else sympy.nsimplify(part, rational=True).as_set()
                for part in both
            ]
            regions.append(sympy.Intersection(*sets))
        return sympy.Union(*regions), variables
    except (NotImplementedError, TypeError, ValueError):  # an inequality that sympy cannot solve
        return None


def _same_region(gold: str, prediction: str) -> bool | None:
    """Whether two sets of reals, one of them given by inequalities, are the same; None where they
    are no such sets.
    """
    if not _RELATION.search(gold + prediction):
        return None
    first, second = _region(gold), _region(prediction)
    if first is None or second is None:
        joined = [
            (bool(_OR_SIGN.search(value)), bool(_AND_SIGN.search(value)))
            for value in (gold, prediction)
        ]
        # to math-verify both are commas
        return False if {(True, False), (False, True)} == set(joined) else None
    return (first[1] == second[1] or not first[1] or not second[1]) and bool(
        first[0].symmetric_difference(second[0]).is_empty
    )


def _other_sides_differ(gold: Any, prediction: str) -> bool:
    """Whether a number stands on some side of `43 = 42` that is not the gold one (math-verify reads
    the last side alone).
    """
    sides = re.split(r"(?<![<>!\\:])=|\\approx(?![a-zA-Z])", prediction)
    numbers = [
        side
        for side in sides[:-1]
        if re.search(r"\d", side) and not re.search(r"[A-Za-z]", _COMMANDS.sub("", side))
    ]
    return any(
        (side := _parse(number.strip())) is None or not _equal(gold, side) for number in numbers
    )


def _repeats_differ(gold: str, prediction: str) -> bool:
    """Whether two bare lists differ of which one repeats an element: math-verify makes sets of
    them, where `3, 1, 1` is `3, 1`.
    """
    lists = [_elements(_SEPARATOR.sub("", value)) for value in (gold, prediction)]
    if all(len(set(elements)) == len(elements) for elements in lists):
        return False
    left = [_parse(element) for element in lists[1]]
    for element in map(_parse, lists[0] if len(lists[0]) == len(left) else ()):
        match = next((i for i, other in enumerate(left) if _equal(element, other)), None)
        if match is None:
            return True
        left.pop(match)
    return bool(left)


def gold_problem(gold: str) -> str | None:
    """Why a gold answer cannot be graded against, or None."""
    import sympy

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
    if parsed is None or parsed.has(sympy.nan, sympy.zoo):
        return f"math-verify cannot read the gold answer `{gold[:80]}`"
    return None


def grade_answer(gold: str, prediction: str) -> Verdict:
    r"""Whether an extracted answer equals the gold one: correct | wrong, or error where the gold
    answer is unusable (`gold_problem`).

    May take unbounded time and memory, and raises what sympy raises: run it in a `Grader` worker.
    """
    if gold_problem(gold):
        return "error"
    if (
        not prediction.strip()
        or len(prediction) > MAX_ANSWER
        or _depth(prediction) > MAX_DEPTH
        or _hidden(prediction)
    ):
        return "wrong"
    raw_gold, gold, prediction = unwrap_gold(gold), _clean(unwrap_gold(gold)), _clean(prediction)
    if _same_text(gold, prediction) and (
        _is_words(gold) or _same_text(*_keep_case(gold, prediction))
    ):
        return "correct"
    if option := _choice(gold):
        chosen = _choice(prediction if len(prediction) > 3 else prediction.upper())
        if chosen is None and option[1]:
            return grade_answer(option[1], prediction)
        return "correct" if chosen and chosen[0] == option[0] else "wrong"
    gold_value, gold_unit = _split_unit(gold, glued_letter=False)
    if _is_words(gold_value):
        return "correct" if _same_words(gold, prediction) else "wrong"
    joined = (_is_plural(gold_value) and re.search(r"\d", gold)) or all(
        _RELATION.search(part) for part in _OR_SIGN.split(prediction)
    )
    if _QUESTION.match(prediction) or _hedges(prediction, may_join=bool(joined)):
        return "wrong"
    value, unit = _split_unit(
        prediction, glued_letter=not re.search(r"[A-Za-z]", _COMMANDS.sub("", gold_value))
    )
    if not unit and _RAW_LETTER.search(raw_gold):  # `3 m` may be a product
        gold_value, gold_unit = gold, ""
    gold_value, value = _keep_case(gold_value, value)
    gold_parsed, parsed, factors = _parse(gold_value), _parse(value), _factors(gold_unit, unit)
    if (
        parsed is None
        or not factors
        or _repeats_differ(gold_value, value)
        or ("=" not in gold_value and _other_sides_differ(gold_parsed, value))
    ):
        return "wrong"
    same = _same_region(gold_value, value)
    if same is None:
        same = any(_equal(gold_parsed, _scaled(parsed, factor)) for factor in factors)
    return "correct" if same else "wrong"


def _scaled(parsed: Any, factor: Any) -> Any | None:
    """A quantity times a factor; nothing but one value can be scaled."""
    import sympy

    if factor == 1:
        return parsed
    value = parsed.rhs if isinstance(parsed, sympy.Eq) else parsed
    return factor * value if isinstance(value, sympy.Expr) else None

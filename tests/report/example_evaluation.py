"""An evaluation's output folder made up from a seed: figures and charts that are asked about, and
problems in words.

    python -m tests.report.example_evaluation docs/evaluation.png

writes its page to a temporary folder and takes a picture of it.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rlfr_vlm.evaluation.ledger import COUNTED, Answer, Judgement, protocol_hash
from rlfr_vlm.evaluation.statistics import Scored, summarize
from rlfr_vlm.report.html import write_report
from tests.report.browser import ARGUMENTS, CHROMIUM

VIEWS = {
    "": ("light", 1280),
    "_dark": ("dark", 1280),
    "_narrow": ("light", 390),
}  # suffix of the file: colours, width
ADDRESS = "#figures/figures-002?only=disagreement"
JUDGE = {
    "model": "example-judge-7b",
    "prompt": "equivalence-1",
    "settings": {"temperature": 0.0, "max_tokens": 256},
}
SCALE = 3  # drawn larger, then made smaller: smooth lines
INK, FILL, PAPER = (38, 50, 72), (150, 178, 226), (255, 255, 255)
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A problem, its right answer and a likely wrong one."""

    source: str
    question: str
    gold: str
    wrong: str
    steps: str
    ending: str  # with SAID for the answer
    draw: Draw | None = None

    def response(self, said: str) -> str:
        return self.steps + self.ending.replace("SAID", f"\\boxed{{{said}}}")


# Pictures.


class Drawing:
    """A white sheet with smooth lines and letters."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(
        self, points: list[tuple[float, float]], fill: tuple[int, int, int] | None = None
    ) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.polygon(scaled, fill=fill)
        self.draw.line([*scaled, scaled[0], scaled[1]], fill=INK, width=2 * SCALE, joint="curve")

    def circle(self, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
        box = [
            (x - radius) * SCALE,
            (y - radius) * SCALE,
            (x + radius) * SCALE,
            (y + radius) * SCALE,
        ]
        self.draw.ellipse(box, fill=fill, outline=INK, width=2 * SCALE)

    def text(self, x: float, y: float, text: str, size: int = 17) -> None:
        self.draw.text(
            (x * SCALE, y * SCALE),
            text,
            fill=INK,
            font=ImageFont.load_default(size * SCALE),
            anchor="mm",
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.resize(
            (self.image.width // SCALE, self.image.height // SCALE), Image.Resampling.LANCZOS
        ).save(path)


def triangle(legs: tuple[int, int]) -> Draw:
    def draw(path: Path) -> None:
        sheet = Drawing(340, 240)
        unit = 190 / max(legs)
        left, base = 60.0, 200.0
        right, top = left + min(250.0, legs[0] * unit * 1.2), max(28.0, base - legs[1] * unit)
        sheet.polygon([(left, base), (right, base), (left, top)], fill=(226, 234, 248))
        sheet.polygon([(left, base), (left + 13, base), (left + 13, base - 13), (left, base - 13)])
        sheet.text((left + right) / 2, base + 20, str(legs[0]))
        sheet.text(left - 24, (base + top) / 2, str(legs[1]))
        sheet.text((left + right) / 2 + 22, (base + top) / 2 - 16, "x")
        sheet.save(path)

    return draw


def ring(side: int) -> Draw:
    def draw(path: Path) -> None:
        sheet = Drawing(300, 250)
        sheet.polygon([(60, 20), (240, 20), (240, 200), (60, 200)], fill=FILL)
        sheet.circle(150, 110, 90, PAPER)
        sheet.text(150, 222, f"{side} cm")
        sheet.save(path)

    return draw


def bars(values: dict[str, int]) -> Draw:
    def draw(path: Path) -> None:
        sheet = Drawing(400, 250)
        top = max(values.values())
        for tick in range(0, top + 1, 10):
            y = 205 - 175 * tick / top
            sheet.draw.line(
                [(48 * SCALE, y * SCALE), (385 * SCALE, y * SCALE)],
                fill=(222, 224, 230),
                width=SCALE,
            )
            sheet.text(28, y, str(tick), 13)
        for at, (name, value) in enumerate(values.items()):
            x = 62 + at * 66
            sheet.polygon(
                [
                    (x, 205),
                    (x + 44, 205),
                    (x + 44, 205 - 175 * value / top),
                    (x, 205 - 175 * value / top),
                ],
                fill=FILL,
            )
            sheet.text(x + 22, 224, name, 14)
        sheet.save(path)

    return draw


# Problems.


def triangle_case(rng: random.Random) -> Case:
    a, b = (
        rng.randint(1, 4) * side
        for side in rng.choice([(3, 4), (8, 6), (12, 5), (2, 2), (3, 2), (15, 8)])
    )
    square = a * a + b * b
    gold = str(math.isqrt(square)) if math.isqrt(square) ** 2 == square else f"\\sqrt{{{square}}}"
    steps = (
        f"The angle between the legs $a = {a}$ and $b = {b}$ is right, so $x$ is the hypotenuse. "
        f"By the Pythagorean theorem\n\\[ x^2 = a^2 + b^2 = {a * a} + {b * b} = {square}. \\]\n"
    )
    return Case(
        "geometry",
        "Find the length $x$ in the figure.",
        gold,
        str(a + b),
        steps,
        "Therefore $x = SAID$.",
        triangle((a, b)),
    )


def ring_case(rng: random.Random) -> Case:
    side = 2 * rng.randint(2, 9)
    area = side * side
    steps = (
        f"<think>\nThe square has side ${side}$, so its area is ${side}^2 = {area}$.\n"
        f"The circle touches all four sides: its radius is half the side, $r = {side // 2}$, and "
        f"its area $\\pi r^2 = {area // 4}\\pi$.\n"
        "The shaded region is what the circle leaves of the square.\n</think>\n\n"
    )
    question = (
        "A circle is inscribed in a square. What is the area of the shaded region, in "
        "square centimetres?"
    )
    gold, wrong = f"{area}-{area // 4}\\pi", f"{area}-{side // 2}\\pi"
    return Case(
        "geometry", question, gold, wrong, steps, "The shaded area is \\[ SAID \\]", ring(side)
    )


def chart_case(rng: random.Random) -> Case:
    values = {name: rng.randint(8, 60) for name in ("Mon", "Tue", "Wed", "Thu", "Fri")}
    ordered = sorted(values, key=lambda name: values[name])
    low, high = ordered[0], ordered[-1]
    question = (
        "The chart shows how many visitors came on each day of a week. How many more came "
        "on the busiest day than on the quietest?"
    )
    steps = (
        "Reading the chart:\n"
        + "".join(f"- {name}: {value}\n" for name, value in values.items())
        + f"\nThe busiest day is {high} with "
        f"{values[high]} visitors, the quietest is {low} with {values[low]}.\n\n"
    )
    gold, wrong = (str(values[high] - values[name]) for name in ordered[:2])
    return Case(
        "charts",
        question,
        gold,
        wrong,
        steps,
        f"The difference is ${values[high]} - {values[low]} = SAID$.",
        bars(values),
    )


def word_case(rng: random.Random) -> Case:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    kind = rng.choice(["roots", "committee", "series"])
    if kind == "roots":
        question = (
            f"Let $r$ and $s$ be the roots of $x^2 - {a + b}x + {a * b} = 0$. "
            f"Compute\n\n\\[ \\frac{{1}}{{r}} + \\frac{{1}}{{s}}. \\]"
        )
        steps = (
            f"By Vieta's formulas $r + s = {a + b}$ and $rs = {a * b}$. Hence\n\\[ \\frac1r + "
            f"\\frac1s = \\frac{{r+s}}{{rs}}. \\]\n"
        )
        gold, wrong = f"\\frac{{{a + b}}}{{{a * b}}}", f"\\frac{{{a * b}}}{{{a + b}}}"
    elif kind == "committee":
        question = f"In how many ways can a committee of {min(a, b)} be chosen from {a + b} people?"
        steps = (
            f"The order does not matter, so the number is $\\binom{{{a + b}}}{{{min(a, b)}}}$.\n"
        )
        gold, wrong = str(math.comb(a + b, min(a, b))), str(math.perm(a + b, min(a, b)))
    else:
        question = (
            f"Find the sum of the infinite series $\\displaystyle \\sum_{{n=0}}^\\infty "
            f"\\left(\\frac{{1}}{{{a}}}\\right)^n$."
        )
        steps = (
            f"A geometric series with ratio $q = \\tfrac1{a}$ has the sum $\\frac{{1}}{{1-q}}$.\n"
        )
        gold, wrong = f"\\frac{{{a}}}{{{a - 1}}}", f"\\frac{{1}}{{{a - 1}}}"
    return Case(
        "counting" if kind == "committee" else "algebra",
        question,
        gold,
        wrong,
        steps,
        "So the answer is $SAID$.",
    )


# Benchmarks.


def write_benchmark(
    folder: Path, title: str, cases: list[Case], num_samples: int, skill: float, seed: int
) -> Path:
    """A benchmark's folder by its contract: protocol, problems, ledger with all five verdicts, and
    a summary.
    """
    rng, name = random.Random(seed), folder.name
    sampling = {
        "answer": "boxed",
        "num_samples": num_samples,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 2048,
    }
    protocol = {
        "benchmark": {"name": name, "version": 1, **sampling},
        "problems": {"count": len(cases), "sha256": f"{seed:016x}"},
        "model": {
            "name": "example-vlm-3b",
            "dtype": "bfloat16",
            "engine": "vllm",
            "fingerprint": "9c01e5d2",
        },
        "seed": 0,
        "pictures": {"kind": "as_is", "min_pixels": None, "max_pixels": 1003520},
        "grading": {"mode": "both", "judge": JUDGE},
    }
    folder.mkdir(parents=True)
    (folder / "protocol.json").write_text(
        json.dumps({"hash": protocol_hash(protocol), "protocol": protocol})
    )
    problems: list[dict] = []
    records: list[tuple[Answer, Judgement]] = []
    for number, case in enumerate(cases):
        images = [f"images/{number:03d}.png"] if case.draw else []
        if case.draw:
            case.draw(folder / images[0])
        id_ = f"{name}-{number:03d}"
        question = "<image>" * len(images) + case.question
        problems.append(
            {
                "id": id_,
                "question": question,
                "images": images,
                "golds": [case.gold],
                "data_source": case.source,
            }
        )
        ease = min(0.97, max(0.02, skill + rng.gauss(0, 0.33)))
        records += [
            one_sample(rng, id_, sample, case, rng.random() < ease) for sample in range(num_samples)
        ]
    write_jsonl(folder / "problems.jsonl", problems)
    write_ledger(folder, records)
    (folder / "summary.json").write_text(
        json.dumps(
            {"benchmark": name, "title": title, "judge": JUDGE, **numbers(records, num_samples)}
        )
    )
    return folder


def one_sample(
    rng: random.Random, id_: str, sample: int, case: Case, right: bool
) -> tuple[Answer, Judgement]:
    """A response with its verdict: mostly the rule's, sometimes the judge's, rarely none."""
    said, draw, seconds = (
        case.gold if right else case.wrong,
        rng.random(),
        round(rng.uniform(0.8, 3.5), 2),
    )
    judge = {"reply": "", "attempts": 1, **JUDGE}
    if draw < 0.05:  # cut before it came to an answer
        text = case.steps[: int(len(case.steps) * 0.8)] + " Wait, let me check that again." * 6
        return Answer(id_, sample, text, "length", 412, 2048, seconds * 4), Judgement(
            id_, sample, "wrong", "", "no answer", "wrong"
        )
    if right and 0.08 < draw < 0.16:
        said = f"x \\approx {said}" if "\\" in said else f"{said}\\text{{ in all}}"
    text = case.response(said)
    answer = Answer(id_, sample, text, "stop", 412, 40 + len(text) // 3, seconds)
    if draw < 0.06:
        verdict = Judgement(
            id_,
            sample,
            "unjudged",
            said,
            "the rule cannot compare these, and no judge is configured",
            "unjudged",
        )
    elif draw < 0.07:
        failed = {**judge, "verdict": "failed", "attempts": 4}
        verdict = Judgement(
            id_, sample, "failed", said, "timeout after 60 s", "wrong", failed, 240.0
        )
    elif draw < 0.08:
        verdict = Judgement(id_, sample, "error", said, "grading took more than 5 s", "error")
    elif right and draw < 0.16:
        reply = (
            f"The reference is {case.gold}. The response concludes with {said}, which is the "
            "same value.\nVERDICT: CORRECT"
        )
        verdict = Judgement(
            id_,
            sample,
            "correct",
            said,
            "",
            "wrong",
            {**judge, "verdict": "correct", "reply": reply},
            1.2,
        )
    elif not right and draw < 0.7:
        reply = (
            f"The response ends with {said}, the reference is {case.gold}: different "
            "values.\nVERDICT: WRONG"
        )
        verdict = Judgement(
            id_,
            sample,
            "wrong",
            said,
            "",
            "wrong",
            {**judge, "verdict": "wrong", "reply": reply},
            0.9,
        )
    else:
        verdict = Judgement(
            id_, sample, "correct" if right else "wrong", said, "", "correct" if right else "wrong"
        )
    return answer, verdict


def numbers(records: list[tuple[Answer, Judgement]], num_samples: int) -> dict:
    """The part of summary.json that the page reads."""
    problems: dict[str, list[Scored]] = {}
    for answer, verdict in records:
        correct = verdict.verdict == "correct" if verdict.verdict in COUNTED else None
        scored = Scored(
            correct, verdict.prediction, answer.finish_reason == "length", answer.response_tokens
        )
        problems.setdefault(answer.problem, []).append(scored)
    found = summarize(list(problems.values()))
    assert found.accuracy is not None and found.majority is not None
    return {
        "num_problems": len(problems),
        "num_samples": num_samples,
        "accuracy": found.accuracy.value,
        "accuracy_ci": [found.accuracy.low, found.accuracy.high],
        "pass_at_k": {str(k): value.value for k, value in found.pass_at.items()},
        "maj_at_k": found.majority.value,
        "verdicts": Counter(verdict.verdict for _, verdict in records),
        "extracted": found.extracted,
    }


def write_ledger(folder: Path, records: list[tuple[Answer, Judgement]]) -> None:
    hash_ = json.loads((folder / "protocol.json").read_text())["hash"]
    kinds = ("response", "verdict")
    write_jsonl(
        folder / "ledger.jsonl",
        [
            {"kind": k, "protocol": hash_, **asdict(r)}
            for pair in records
            for k, r in zip(kinds, pair, strict=True)
        ],
    )


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_evaluation(
    folder: Path, num_problems: int = 120, num_samples: int = 4, seed: int = 3
) -> Path:
    """Two benchmarks, the first with pictures."""
    rng = random.Random(seed)
    figures = [rng.choice((triangle_case, ring_case, chart_case))(rng) for _ in range(num_problems)]
    words = [word_case(rng) for _ in range(num_problems // 2)]
    write_benchmark(folder / "figures", "Figures and charts", figures, num_samples, 0.62, seed)
    write_benchmark(folder / "words", "Word problems", words, num_samples, 0.74, seed + 1)
    return folder


def main(target: str, address: str = ADDRESS, suffixes: tuple[str, ...] = ("",)) -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = write_report(make_evaluation(Path(folder) / "eval"))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for suffix in suffixes:
            scheme, width = VIEWS[suffix]
            page = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            ).new_page()
            page.goto(report.as_uri() + address)
            page.wait_for_selector("#problem[data-problem]", state="attached")
            page.screenshot(path=target.removesuffix(".png") + suffix + ".png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])

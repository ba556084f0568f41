"""The page of an evaluation: its files read, and the page opened from disk in headless Chromium
with the network off.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from rlfr_vlm.evaluation.ledger import Answer, Judgement
from rlfr_vlm.report import evaluation_page
from rlfr_vlm.report.evaluation import BenchmarkFiles, find_benchmarks, headline, read_benchmark
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.reading import FileNote
from tests.report.browser import Opened, needs_browser
from tests.report.example_evaluation import (
    Case,
    make_evaluation,
    one_sample,
    word_case,
    write_benchmark,
    write_jsonl,
    write_ledger,
)
from tests.report.test_report import MALICE, make_run

SAMPLE = Answer("p", 0, "so $x = \\boxed{12}$", "stop", 10, 20, 1.5)


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    return make_evaluation(tmp_path_factory.mktemp("runs") / "eval", num_problems=40)


@pytest.fixture(scope="module")
def page_file(example) -> Path:
    return write_report(example)


def small(
    folder: Path,
    pairs: list[tuple[Answer, Judgement | None]],
    problems: list[dict] | None = None,
    num_samples: int = 1,
) -> Path:
    """A benchmark's folder with these records and no summary."""
    folder.mkdir(parents=True)
    (folder / "protocol.json").write_text(
        json.dumps(
            {
                "hash": "h",
                "protocol": {"benchmark": {"num_samples": num_samples}, "model": {"endpoint": "m"}},
            }
        )
    )
    ids = dict.fromkeys(answer.problem for answer, _ in pairs)
    write_jsonl(
        folder / "problems.jsonl",
        problems or [{"id": id_, "question": "?", "images": [], "golds": ["12"]} for id_ in ids],
    )
    lines = []
    for answer, verdict in pairs:
        lines.append({"kind": "response", "protocol": "h", **asdict(answer)})
        lines += [{"kind": "verdict", "protocol": "h", **asdict(verdict)}] if verdict else []
    write_jsonl(folder / "ledger.jsonl", lines)
    return folder


def read(folder: Path) -> tuple[BenchmarkFiles, list[FileNote]]:
    notes: list[FileNote] = []
    return read_benchmark(folder, folder.parent, notes), notes


def numbers_of(path: Path) -> dict:
    return json.loads(re.search(r'id="evaluation-data">(.*?)</script>', path.read_text(), re.S)[1])


# What is read.


def test_a_benchmark_is_read_as_its_contract_says(example):
    files, notes = read(example / "figures")
    lines = [
        json.loads(line) for line in (example / "figures/ledger.jsonl").read_text().splitlines()
    ]
    assert not notes
    assert (files.name, files.title, len(files.problems)) == ("figures", "Figures and charts", 40)
    assert (
        files.protocol_hash == json.loads((example / "figures/protocol.json").read_text())["hash"]
    )
    assert [sample.response for sample in files.samples] == [
        line["response"] for line in lines if line["kind"] == "response"
    ]
    assert [sample.verdict for sample in files.samples] == [
        line["verdict"] for line in lines if line["kind"] == "verdict"
    ]
    assert files.problems[3].images == ("images/003.png",)
    numbers = headline(files)
    assert not numbers.provisional
    assert numbers.accuracy.value == files.summary["accuracy"]
    assert [numbers.accuracy.low, numbers.accuracy.high] == files.summary["accuracy_ci"]
    assert all(
        numbers.counts[verdict] == count for verdict, count in files.summary["verdicts"].items()
    )
    assert numbers.agreement[1] > numbers.agreement[0] > 0


def test_a_ledger_that_is_being_written_is_read_up_to_its_last_line(tmp_path):
    again = replace(SAMPLE, sample=1)
    pairs = [
        (SAMPLE, Judgement("p", 0, "failed", "12")),
        (again, None),
        (SAMPLE, Judgement("p", 0, "correct", "12")),
    ]
    folder = small(tmp_path / "b", pairs, num_samples=4)
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "response", "protocol": "h", "prob')
    files, notes = read(folder)
    assert not notes
    assert [sample.verdict for sample in files.samples] == [
        "correct",
        "pending",
        "unanswered",
        "unanswered",
    ]
    numbers = headline(files)
    assert numbers.provisional
    assert (numbers.accuracy.value, numbers.accuracy.num_problems) == (1.0, 1)
    assert numbers.counts == {
        "correct": 1,
        "wrong": 0,
        "unjudged": 0,
        "failed": 0,
        "error": 0,
        "pending": 1,
        "unanswered": 2,
    }


def test_a_score_that_the_evaluation_withheld_is_not_shown_and_an_old_summary_decides_nothing(
    tmp_path,
):
    folder = small(
        tmp_path / "b",
        [
            (SAMPLE, Judgement("p", 0, "correct", "12")),
            (replace(SAMPLE, problem="q"), Judgement("q", 0, "failed")),
        ],
    )
    summary = {"accuracy": None, "accuracy_ci": None, "verdicts": {"correct": 1, "failed": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    numbers = headline(read(folder)[0])
    assert (numbers.accuracy, numbers.withheld, numbers.provisional) == (None, True, False)
    (folder / "summary.json").write_text(json.dumps({**summary, "verdicts": {"failed": 2}}))
    numbers = headline(read(folder)[0])
    assert (numbers.accuracy.value, numbers.withheld, numbers.provisional) == (1.0, False, True)


def test_damage_is_left_out_and_named(tmp_path):
    folder = small(tmp_path / "b", [(SAMPLE, Judgement("p", 0, "wrong"))])
    lines = [
        {"kind": "response", "protocol": "other", **asdict(SAMPLE)},
        {
            "kind": "verdict",
            "protocol": "h",
            **asdict(replace(Judgement("p", 0, "wrong"), verdict="perhaps")),
        },
        {"kind": "verdict", "protocol": "h", **asdict(Judgement("nobody", 0, "correct"))},
        {"kind": "response", "protocol": "h", **asdict(replace(SAMPLE, problem="unknown"))},
    ]
    with (folder / "ledger.jsonl").open("a") as file:
        file.write("no json\n" + "".join(json.dumps(line) + "\n" for line in lines))
    files, notes = read(folder)
    assert [
        (problem.id, [sample.verdict for sample in problem.samples]) for problem in files.problems
    ] == [
        ("p", ["wrong"]),
        ("unknown", ["pending"]),
    ]
    assert {(note.file, note.text) for note in notes} == {
        ("b/ledger.jsonl", "1 lines are not JSON objects, first line 3; left out"),
        ("b/ledger.jsonl", "1 lines are neither a response nor a verdict; left out"),
        ("b/ledger.jsonl", "1 lines belong to another protocol; left out"),
        ("b/ledger.jsonl", "1 verdicts have no response; left out"),
        ("b/problems.jsonl", "1 problems of the ledger are not in it"),
    }


def test_the_page_is_chosen_by_what_the_folder_holds(tmp_path):
    folder = small(tmp_path / "eval/b", [(SAMPLE, Judgement("p", 0, "correct"))])
    assert find_benchmarks(tmp_path) == [folder]  # in its eval/
    for place in (tmp_path, tmp_path / "eval", folder):
        assert numbers_of(write_report(place))["name"] == "m"
    for model in ("base", "trained"):
        shutil.copytree(folder, tmp_path / "both" / model / "b")
    assert [
        head["title"] for head in numbers_of(write_report(tmp_path / "both"))["benchmarks"]
    ] == ["b (base)", "b (trained)"]
    run = make_run(tmp_path / "run", steps=2)
    for place in (
        "step_000002/b",
        "step_000010/b",
        "vlmeval/c",
    ):  # of a benchmark run during training the newest
        shutil.copytree(folder, run / "eval" / place, ignore=shutil.ignore_patterns("report.html"))
    assert 'id="run-data"' in write_report(run).read_text()
    found = {
        head["folder"]: head["title"] for head in numbers_of(run / "evaluation.html")["benchmarks"]
    }
    assert found == {"eval/step_000010/b": "b, step 10", "eval/vlmeval/c": "c"}


@needs_browser
def test_too_much_is_cut_or_left_out_and_the_page_says_so(tmp_path, monkeypatch, open_report):
    rng = random.Random(0)
    base = tmp_path / "eval"
    folder = base / "b"
    texts = ["".join(rng.choices("abcdefgh \n", k=30_000)) for _ in range(8)]
    pairs = [
        (replace(SAMPLE, problem=f"p{at}", response=text), Judgement(f"p{at}", 0, "correct"))
        for at, text in enumerate(texts)
    ]
    problems = [
        {"id": f"p{at}", "question": "?", "images": [f"images/{at}.png"], "golds": []}
        for at in range(8)
    ]
    small(folder, pairs, problems)
    (folder / "images").mkdir()
    for at in range(8):
        Image.effect_noise((700, 500), 90 + at).save(folder / f"images/{at}.png")
    problems[0]["images"] = ["../../secret.png"]
    write_jsonl(folder / "problems.jsonl", problems)
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    whole = write_report(base)
    assert [note["text"].split(",")[0] for note in numbers_of(whole)["problems"]] == [
        "1 pictures are missing"
    ]
    assert whole.read_text().count('id="picture-') == 7
    size = whole.stat().st_size
    monkeypatch.setattr(evaluation_page, "TEXT_BYTES", 60_000)
    monkeypatch.setattr(evaluation_page, "PICTURE_BYTES", 60_000)
    path = write_report(base)
    notes = [note["text"] for note in numbers_of(path)["problems"]]
    assert any(
        re.match(r"8 responses of more than 10,000 characters are shown without their middle", note)
        for note in notes
    )
    left_out = next(int(note.split()[3]) for note in notes if note.startswith("the pictures of"))
    assert 0 < left_out == 7 - path.read_text().count('id="picture-')
    assert path.stat().st_size < size / 2
    report = open_report(path, "#b/p7")
    opened(report, "p7")
    assert "left out to keep this file small" in report.page.inner_text("#problems")
    assert report.page.locator("#problem .pictures a").get_attribute("href") == "./b/images/7.png"
    report.page.locator("#problem .text > button").first.click()
    assert "20,000 characters only in b/ledger.jsonl" in report.page.inner_text("#problem .text")
    assert texts[7].endswith(report.page.inner_text("#problem .text")[-1000:])


# What is seen.


def shown(report: Opened) -> str:
    return report.page.inner_text("#tally")


def until(report: Opened, script: str) -> None:
    """Wait for an expression to hold. (Playwright's own way is `eval`, which the page's policy
    forbids.)
    """
    end = time.monotonic() + 10
    while not report.evaluate(script):
        assert time.monotonic() < end, script
        report.page.wait_for_timeout(20)


def chip(report: Opened, value: str) -> None:
    """Press a filter and wait for what it leaves."""
    before = shown(report)
    report.page.click(f'.chip[data-value="{value}"]')
    until(report, f"document.getElementById('tally').textContent !== {json.dumps(before)}")


def opened(report: Opened, problem: str) -> None:
    report.page.wait_for_selector(f'#problem[data-problem="{problem}"]')


@needs_browser
def test_numbers_stand_beside_what_they_do_not_count(example, page_file, open_report):
    report = open_report(page_file)
    page = report.page
    opened(report, "figures-000")
    assert page.inner_text("#model-name") == "example-vlm-3b"
    row = page.locator(".benchmarks tbody tr").first
    summary = json.loads((example / "figures/summary.json").read_text())
    uncounted = sum(
        summary["verdicts"].get(verdict, 0) for verdict in ("unjudged", "failed", "error")
    )
    assert f"{100 * summary['accuracy']:.1f} %" in row.inner_text()
    assert (
        f"{100 * summary['accuracy_ci'][0]:.1f} – {100 * summary['accuracy_ci'][1]:.1f}"
        in row.inner_text()
    )
    assert (
        row.locator("[data-title='Not counted'] b").inner_text() == str(uncounted)
        and f"{uncounted} of 160" in row.inner_text()
    )
    assert not page.locator("#protocol table").is_visible()
    page.click("#protocol summary")
    table = page.inner_text("#protocol table")
    assert (
        "benchmark.max_new_tokens" in table
        and "grading.judge.settings.temperature" in table
        and "extracted" in table
    )
    assert not report.complaints
    assert [url for url in report.requests if not url.startswith(("file:", "data:"))] == []


@needs_browser
def test_filters_search_and_order_choose_problems(example, page_file, open_report):
    verdicts = [
        sample.verdict
        for name in ("figures", "words")
        for sample in read(example / name)[0].samples
    ]
    report = open_report(page_file)
    page = report.page
    opened(report, "figures-000")
    assert shown(report) == "60 problems, 240 responses"
    assert page.locator(".row").count() < 30  # only those in sight
    for verdict in ("correct", "wrong", "unjudged", "failed", "error"):
        if verdict in verdicts:
            chip(report, verdict)
            assert shown(report).endswith(
                f", {verdicts.count(verdict)} response{'s' * (verdicts.count(verdict) > 1)}"
            )
            assert set(page.locator("#problem .samples .badge").all_inner_texts()) == {
                {
                    "correct": "✓ correct",
                    "wrong": "✗ wrong",
                    "unjudged": "? unjudged",
                    "failed": "! failed",
                    "error": "! error",
                }[verdict]
            }
            page.click("#clear")
    chip(report, "words")
    assert shown(report) == "20 problems, 80 responses"
    chip(report, "disagreement")
    assert (
        page.locator("#problem .samples > section").count()
        == page.locator("#problem .samples .response:has-text('rule ≠ judge')").count()
    )
    page.click("#clear")
    page.fill("#search", "committee of")
    until(report, "document.getElementById('tally').textContent.split(' ')[0] < 20")
    assert page.locator("#problem .question mark.hit").count() == 1
    assert "search=committee+of" in page.url
    page.fill("#search", "no such text anywhere")
    page.wait_for_selector("#rows .empty")
    page.click("#clear")
    page.select_option("#order", "hardest")
    until(report, "document.querySelector('.row .score b').textContent.startsWith('0/')")
    assert not report.complaints


@needs_browser
def test_a_problem_shows_picture_response_answer_verdicts_and_the_judges_words(
    example, page_file, open_report
):
    files = read(example / "figures")[0]
    problem = next(
        p
        for p in files.problems
        if any(s.rule_and_judge == ("wrong", "correct") for s in p.samples)
    )
    sample = next(s for s in problem.samples if s.rule_and_judge == ("wrong", "correct"))
    report = open_report(
        page_file, f"#figures/{problem.id}?only=disagreement&sample={sample.index}"
    )
    page = report.page
    opened(report, problem.id)
    assert problem.question.removeprefix("<image>") == page.inner_text("#problem .question")
    assert page.inner_text("#problem .gold b") == problem.golds[0]
    picture = page.locator("#problem .pictures img")
    until(report, "document.querySelector('#problem .pictures img').naturalWidth > 0")
    card = page.locator(f"#sample-{sample.index}")
    assert card.locator(".text").inner_text() == sample.response
    assert card.locator("mark.answer").inner_text() == sample.prediction
    header = card.locator("header").inner_text()
    assert (
        "✓ correct" in header
        and "rule wrong" in header
        and "judge correct" in header
        and "rule ≠ judge" in header
    )
    assert card.locator("blockquote").inner_text() == sample.judge["reply"]
    assert "example-judge-7b" in card.locator(".judge").inner_text()
    assert f"{sample.response_tokens} tokens, stop" in card.locator("footer").inner_text()
    picture.click()
    assert page.locator("#lightbox[open] img").evaluate(
        "image => image.complete && image.naturalWidth > 0"
    )
    page.click("#lightbox")
    assert not report.complaints


@needs_browser
def test_keys_go_to_the_next_problem_and_the_address_follows(page_file, open_report):
    report = open_report(page_file, "#words/words-003?order=file")
    page = report.page
    opened(report, "words-003")
    row, body = (
        page.locator(".row[aria-current]").bounding_box(),
        page.locator("#list-body").bounding_box(),
    )
    assert body["y"] <= row["y"] and row["y"] + row["height"] <= body["y"] + body["height"]
    page.keyboard.press("ArrowRight")
    opened(report, "words-004")
    page.keyboard.press("k")
    page.keyboard.press("k")
    opened(report, "words-002")
    assert page.url.endswith("#words/words-002")
    assert page.locator(".row[aria-current]").inner_text().startswith("words-002")
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#search") == "jk"
    page.click("#clear")
    opened(report, "figures-000")
    page.locator(".row[href$='figures-003']").click()
    opened(report, "figures-003")
    page.go_back()
    opened(report, "figures-000")
    assert not report.complaints


@needs_browser
def test_long_responses_show_both_ends_and_the_rest_on_request(tmp_path, open_report):
    text = "first words\n" + "step by step " * 900 + "\nso \\boxed{12}, says the end"
    pairs = [
        (replace(SAMPLE, response=text, sample=at), Judgement("p", at, "correct", "12"))
        for at in range(20)
    ]
    report = open_report(write_report(small(tmp_path / "b", pairs, num_samples=20)))
    page = report.page
    opened(report, "p")
    card = page.locator("#sample-0 .text")
    assert (
        card.inner_text().startswith("first words")
        and card.inner_text().endswith("says the end")
        and len(card.inner_text()) < 4000
    )
    card.locator("button").click()
    assert card.inner_text() == text
    assert page.locator("#problem .samples > section").count() == 8
    page.click("#problem > .more")
    assert page.locator("#problem .samples > section").count() == 20
    assert page.locator(".row .verdicts .correct").count() == 1
    assert not report.complaints


@needs_browser
@pytest.mark.parametrize(
    ("response", "prediction", "marked"),
    [
        (
            "first \\boxed{3}, then \\boxed{\\frac{1}{2}}, not 12",
            "\\frac{1}{2}",
            "\\boxed{|\\frac{1}{2}|}",
        ),
        ("I think <answer>12</answer> as 12 is even", "12", "<answer>|12|</answer>"),
        ("there are 12 of 112, so the answer is 12 or 12a", "12", "answer is |12| or"),
        ("\\boxed{ \\dfrac{1}{2} }", "\\frac{1}{2}", "\\boxed{| \\dfrac{1}{2} |}"),
        ("nothing of it", "7", None),
    ],
)
def test_the_answer_is_marked_where_it_was_read(
    tmp_path, response, prediction, marked, open_report
):
    pairs = [(replace(SAMPLE, response=response), Judgement("p", 0, "correct", prediction))]
    report = open_report(write_report(small(tmp_path / "b", pairs)))
    opened(report, "p")
    found = report.evaluate(
        """() => [...document.querySelectorAll("#sample-0 .text *, #sample-0 .text")].flatMap((node) => [...node.childNodes])
            .filter((node) => node.nodeType === 3)
            .map((node) => (node.parentNode.matches("mark.answer") ? `|${node.data}|` : node.data)).join("")"""
    )
    text = "".join(sorted(found)) == "".join(sorted(response + "||" * (marked is not None)))
    assert text, found
    marks = report.page.locator("#sample-0 mark.answer").all_text_contents()
    assert marks == ([] if marked is None else [marked.split("|")[1]])
    if marked is not None:
        before = report.evaluate(
            """() => { const range = document.createRange(), mark = document.querySelector("mark.answer");
                range.selectNodeContents(document.querySelector("#sample-0 .text")); range.setEndBefore(mark); return range.toString(); }"""
        )
        assert before == response[: response.index(marked.replace("|", "")) + marked.index("|")]


@needs_browser
def test_hostile_text_stays_text(tmp_path, open_report):
    hostile = f"{MALICE} \\boxed{{</mark><img src=y onerror=window.hacked=3>}} \ud800"
    judge = {"verdict": MALICE, "reply": MALICE, "model": MALICE, "attempts": 2, MALICE: MALICE}
    id_ = "../<b>?#%/'\" " + MALICE
    prediction = "</mark><img src=y onerror=window.hacked=3>"
    verdict = Judgement(id_, 0, "wrong", prediction, MALICE, MALICE, judge)
    problem = {
        "id": id_,
        "question": MALICE + " $<img src=z onerror=window.hacked=4>$",
        "images": [MALICE],
        "golds": [MALICE] * 2,
    }
    other = {
        "id": "plain",
        "question": "?",
        "images": ["javascript:window.hacked=5"],
        "golds": [],
        "data_source": MALICE,
    }
    pairs = [
        (Answer(id_, 0, hostile, MALICE, 1, 2, 1.0), verdict),
        (replace(SAMPLE, problem="plain"), Judgement("plain", 0, "correct")),
    ]
    folder = small(tmp_path / "<img src=x onerror=window.hacked=6>", pairs, [problem, other])
    (folder / "protocol.json").write_text(
        json.dumps({"hash": "h", "protocol": {"model": MALICE, MALICE: {MALICE: MALICE}}})
    )
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "title": MALICE,
                "verdicts": {"correct": 1, "wrong": 1},
                "accuracy": 0.5,
                MALICE: MALICE,
            }
        )
    )
    report = open_report(write_report(tmp_path))
    page = report.page
    page.wait_for_selector("#problem[data-problem]")
    assert "</script><script>window.hacked=1</script>" in page.inner_text("#problem .question")
    assert page.locator("mark.answer").inner_text() == prediction
    assert "window.hacked=1" in page.inner_text("blockquote")
    address = page.locator("#problem a.name").first.get_attribute("href")
    page.keyboard.press("j")
    opened(report, "plain")
    report.evaluate("(address) => { location.hash = address; }", address)
    until(report, "document.getElementById('problem').dataset.problem !== 'plain'")
    page.fill("#search", "<img src=y")
    page.wait_for_selector("#problem mark.hit")
    page.click("#protocol summary")
    assert report.evaluate("window.hacked") is None
    assert (
        page.locator(
            "main script, main img[src=x], main img[src=y], main img[src=z], main b b, "
            "a[href^=javascript]"
        ).count()
        == 0
    )
    assert not report.complaints
    report.evaluate(
        """() => {  // and were it not text, the page's policy would still not run it
            document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.hacked = 7'>");
        }"""
    )
    page.wait_for_timeout(100)
    assert report.evaluate("window.hacked") is None
    assert all("Content Security Policy" in complaint for complaint in report.complaints)


@needs_browser
@pytest.mark.parametrize("state", ["nothing_yet", "half_written", "nonsense"])
def test_an_unfinished_evaluation_shows_what_there_is(tmp_path, state, open_report):
    folder = write_benchmark(
        tmp_path / "words", "Words", [word_case(random.Random(at)) for at in range(6)], 2, 0.5, 1
    )
    (folder / "summary.json").unlink()
    if state == "nothing_yet":
        for name in ("problems.jsonl", "ledger.jsonl"):
            (folder / name).unlink()
    if state == "half_written":
        (folder / "ledger.jsonl").write_bytes((folder / "ledger.jsonl").read_bytes()[:3000])
    if state == "nonsense":
        for path in list(folder.iterdir()):
            path.write_bytes(
                b'\xff\x00[[{"hash": {}}\n'
                + b'{"id": {}, "images": 3, "golds": {}, "kind": 1, "sample": 1e999, "verdicts": '
                b"3}\n[]\n" * 3
            )
    report = open_report(write_report(tmp_path))
    if state == "half_written":
        report.page.wait_for_selector("#problem[data-problem]")
        assert re.fullmatch(
            r"\d of 12 responses graded", report.page.inner_text("#evaluation-state")
        )
        assert "so far" in report.page.inner_text(
            ".benchmarks"
        ) and "no response yet" in report.page.inner_text(".benchmarks")
    else:
        report.page.wait_for_selector("#problems")
        assert "words/ledger.jsonl" in report.page.inner_text("#problems")
    assert not report.complaints


@needs_browser
def test_the_page_of_a_run_leads_to_its_benchmarks(tmp_path, example, open_report):
    run = make_run(tmp_path / "run", steps=2)
    shutil.copytree(
        example, run / "eval", dirs_exist_ok=True, ignore=shutil.ignore_patterns("report.html")
    )
    report = open_report(write_report(run))
    page = report.page
    assert page.locator("#benchmarks tbody tr").count() == 2
    assert "Figures and charts" in page.inner_text("#benchmarks") and " of 160" in page.inner_text(
        "#benchmarks"
    )
    page.click("#benchmarks a")
    opened(report, "figures-000")
    until(report, "document.querySelector('#problem .pictures img').naturalWidth > 0")
    assert not report.complaints


@needs_browser
def test_dark_and_narrow_pages_have_no_sideways_scroll(page_file, open_report):
    colours = set()
    for scheme, width in (("light", 390), ("dark", 390), ("dark", 1280)):
        report = open_report(
            page_file, color_scheme=scheme, viewport={"width": width, "height": 800}
        )
        page = report.page
        page.wait_for_selector("#problem[data-problem]", state="attached")
        colours.add(report.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        narrow = "document.documentElement.scrollWidth <= innerWidth"
        assert report.evaluate(narrow)
        assert page.locator("#problem").is_visible() == (width > 390)
        page.locator(".row").nth(2).click()
        page.wait_for_selector("#problem[data-problem=figures-002]")
        assert page.locator("#list").is_visible() == (width > 390)
        assert report.evaluate(narrow)
        if width == 390:
            page.click(".back")
            assert page.locator("#list").is_visible()
        assert not report.complaints
    assert len(colours) == 2


@needs_browser
def test_three_thousand_samples_filter_in_under_200_ms(tmp_path, open_report):
    rng = random.Random(0)
    case = Case(
        "algebra",
        "How much is it? " * 8,
        "12",
        "13",
        "Let me think about it step by step. " * 60,
        "So it is $SAID$.",
    )
    folder = small(tmp_path / "b", [(SAMPLE, None)], num_samples=4)
    write_jsonl(
        folder / "problems.jsonl",
        [
            {"id": f"p{at}", "question": case.question, "images": [], "golds": ["12"]}
            for at in range(750)
        ],
    )
    write_ledger(
        folder,
        [
            one_sample(rng, f"p{at}", k, case, rng.random() < 0.5)
            for at in range(750)
            for k in range(4)
        ],
    )
    start = time.perf_counter()
    path = write_report(tmp_path)
    assert time.perf_counter() - start < 10
    report = open_report(path)
    report.page.wait_for_selector("#problem[data-problem]")
    measured = report.evaluate(
        """async () => {
            const times = [];
            for (let at = 0; at < 4; at++) {
                const start = performance.now();
                await changed(browser.settings.verdict[at % 2 ? "clear" : "add"]("wrong"));
                byId("rows").getBoundingClientRect();
                times.push(performance.now() - start);
            }
            for (const text of ["nothing like it", "\\\\boxed{13}", "step by", "in all"]) {
                const start = performance.now();
                browser.settings.search = text;
                await changed();
                times.push(performance.now() - start);
            }
            return times;
        }"""
    )
    assert min(measured[:4]) < 200 and min(measured[5:]) < 200, (
        measured
    )  # the page's own time: the slower ones waited
    assert report.page.locator("#problem mark.hit").count() >= 1
    assert not report.complaints

"""Benchmarks through the real command: nothing is asked twice, nothing is lost, and what has no
verdict is in no accuracy.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import yaml

from rlfr_vlm.commands import evaluate_benchmarks
from rlfr_vlm.config import parse_config
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.evaluation.ledger import read_ledger
from rlfr_vlm.types import request_seed
from tests.evaluation.scripted_server import ScriptedServer
from tests.runs import ROOT, cli, make_config, make_data

NUM_PROBLEMS = 24


def sums(folder, name="sums", count=NUM_PROBLEMS, **settings):
    """A benchmark of the user's own: a YAML and a JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"p{i}",
            "problem": f"What is {i} + 1?",
            "answer": str(i + 1),
            "data_source": f"s{i % 2}",
        }
        for i in range(count)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": name,
        "file": "sums.jsonl",
        "num_problems": count,
        "num_samples": 2,
        "temperature": 0.7,
        "max_new_tokens": 64,
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def model(request):
    """Right on two problems of three; on the others it says the right thing in words that no rule
    reads, or the wrong one.
    """
    found = re.search(r"What is (\d+)", json.dumps(request["messages"]))
    if found is None:
        return "Hello."  # to a probe
    number = int(found.group(1))
    if number % 3 < 2:
        return f"Therefore \\boxed{{{number + 1}}}."
    return "It is one more, as judges can tell." if number % 2 else f"\\boxed{{{number}}}"


def judge(request):
    """Right where the response asks judges to tell."""
    text = request["messages"][-1]["content"]
    found = re.search(r"\[(\w+) question\]", text)
    if found is None:
        return "Hello."
    code = found.group(1)
    return f"So it is.\n{code}:{int('judges can tell' in text)}"


def config(folder, benchmark, server, **settings):
    return parse_config(
        {
            "output_dir": str(folder / "out"),
            "model": {"path": "scripted"},
            "reward": {"grader": {"workers": 1}},
            "eval": {
                "benchmarks": [benchmark],
                "endpoint": {"api_base": server.api_base, "model": "scripted", "retries": 8},
                **settings,
            },
        }
    )


def asked(server):
    """Requests for answers, without the probe's."""
    return sum(n for prompt, n in server.count.items() if "What is" in prompt)


def table(summary):
    """What must not depend on how often the run was interrupted."""
    return {k: v for k, v in summary["sums"].items() if k != "seconds"}


def test_a_server_is_evaluated_and_nothing_is_asked_twice(tmp_path):
    benchmark = sums(tmp_path)
    with ScriptedServer(answer=model) as server:
        first = evaluate_benchmarks(config(tmp_path, benchmark, server))
        assert asked(server) == NUM_PROBLEMS * 2
        assert table(evaluate_benchmarks(config(tmp_path, benchmark, server))) == table(first)
        assert asked(server) == NUM_PROBLEMS * 2
        with pytest.raises(
            UserError, match=r"another protocol \(benchmark\.temperature: 0\.7 -> 0\.1\)"
        ):
            evaluate_benchmarks(config(tmp_path, benchmark, server, temperature=0.1))
        assert asked(server) == NUM_PROBLEMS * 2
    found = first["sums"]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["verdicts"] == {"correct": 32, "wrong": 16, "unjudged": 0, "failed": 0, "error": 0}
    assert found["pass_at_k"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(2 / 3)}
    assert found["maj_at_k"] == pytest.approx(2 / 3)
    assert found["accuracy_ci"][0] < 2 / 3 < found["accuracy_ci"][1]
    assert set(found["by_source"]) == {"s0", "s1"}
    seeds = [body["seed"] for body in server.bodies if "What is" in json.dumps(body["messages"])]
    assert len(set(seeds)) == len(seeds)


FAULTS = {"429": 0.1, "500": 0.1, "garbage": 0.1, "half": 0.1}


def test_faults_in_four_calls_of_ten_change_nothing(tmp_path):
    benchmark = sums(tmp_path)
    with ScriptedServer(answer=model) as server:
        expected = evaluate_benchmarks(config(tmp_path / "healthy", benchmark, server))
    with ScriptedServer(answer=model, faults=FAULTS) as server:
        found = evaluate_benchmarks(config(tmp_path / "faulty", benchmark, server))
        assert sum(server.met.values()) > 5
        assert (
            sum(n for prompt, n in server.answered.items() if "What is" in prompt)
            == NUM_PROBLEMS * 2
        )
    assert table(found) == table(expected)


@pytest.mark.parametrize(
    ("grading", "accuracy", "agreement"),
    [("rule_then_judge", 20 / 24, 0.5), ("judge", 4 / 24, 4 / 24), ("both", 4 / 24, 4 / 24)],
)
def test_a_judge_decides_as_the_grading_says(tmp_path, grading, accuracy, agreement):
    """The scripted judge knows only the responses that appeal to judges: 4 of 24, all of which the
    rules call wrong.
    """
    benchmark = sums(tmp_path, num_samples=1)
    with ScriptedServer(answer=model) as server, ScriptedServer(answer=judge) as judges:
        said = {"api_base": judges.api_base, "model": "scripted", "retries": 8}
        found = evaluate_benchmarks(
            config(tmp_path, benchmark, server, grading=grading, judge=said)
        )["sums"]
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["rule_accuracy"] == pytest.approx(16 / 24)
    assert found["agreement"] == pytest.approx(agreement)
    assert found["judge"]["model"] == "scripted"
    lines = [
        json.loads(line) for line in (tmp_path / "out/sums/ledger.jsonl").read_text().splitlines()
    ]
    judged = [line["judge"] for line in lines if line["kind"] == "verdict" and line["judge"]]
    assert len(judged) == (8 if grading == "rule_then_judge" else 24)
    assert all(entry["prompt"] == "equivalence-1" and entry["reply"] for entry in judged)


def test_what_the_judge_failed_to_say_is_no_wrong_answer(tmp_path):
    benchmark = sums(tmp_path, num_samples=1)
    with ScriptedServer(answer=model) as server:
        with ScriptedServer(answer=judge) as judges:
            said = {"api_base": judges.api_base, "model": "scripted", "retries": 8}
            expected = evaluate_benchmarks(
                config(
                    tmp_path / "healthy", benchmark, server, grading="rule_then_judge", judge=said
                )
            )
        with ScriptedServer(answer=judge) as judges:
            said = {"api_base": judges.api_base, "model": "scripted", "retries": 0}
            ill = config(tmp_path / "ill", benchmark, server, grading="rule_then_judge", judge=said)
            judges.faults = lambda prompt, before: (
                "500" if "final answer" in prompt and zlib.crc32(prompt.encode()) % 2 else None
            )
            with pytest.raises(
                StoppedError,
                match=r"of 24 responses 0 are missing, \d+ verdicts failed.*run the same command "
                r"again",
            ):
                evaluate_benchmarks(ill)
            summary = json.loads((tmp_path / "ill/out/sums/summary.json").read_text())
            assert summary["accuracy"] is None
            assert summary["verdicts"]["failed"] > 0
            before = asked(server)
            judges.faults = {}
            found = evaluate_benchmarks(ill)
            assert asked(server) == before
    assert table(found) == table(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": ["aime1999"]}, r"there is no `aime1999`; known: .*aime24"),
        ({"grading": "judge"}, "eval.grading=judge needs a judge"),
        (
            {"judge": {"model": "m", "api_base": "http://127.0.0.1:9/v1"}},
            "eval.grading=rule asks nobody",
        ),
        (
            {"benchmarks": ["math500"], "data_dir": "/nowhere"},
            "/nowhere/math500/math500.jsonl does not exist",
        ),
        (
            {
                "grading": "both",
                "judge": {"model": "m", "api_base": "http://127.0.0.1:9/v1", "retries": 0},
            },
            "127.0.0.1:9",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_request(tmp_path, settings, message):
    benchmark = sums(tmp_path)
    with ScriptedServer(answer=model) as server:
        with pytest.raises(UserError, match=message):
            evaluate_benchmarks(config(tmp_path, benchmark, server, **settings))
        assert asked(server) == 0


def test_a_definition_that_does_not_fit_its_data_is_refused(tmp_path):
    with ScriptedServer(answer=model) as server:
        with pytest.raises(UserError, match="has 24 problems, the definition says 30"):
            evaluate_benchmarks(config(tmp_path, sums(tmp_path, num_problems=30), server))
        with pytest.raises(UserError, match=r"sums\.yaml: `temprature`"):
            evaluate_benchmarks(config(tmp_path, sums(tmp_path, temprature=1), server))


def kill_and_resume(tmp_path, moments):
    """Kill the real command at these seconds after its first answer, then let it finish. Requests
    for stored answers must not be repeated.
    """
    benchmark = sums(tmp_path)
    with ScriptedServer(answer=model) as server:
        expected = evaluate_benchmarks(config(tmp_path / "whole", benchmark, server))
    with ScriptedServer(answer=model, pause=0.15) as server:
        command = [
            sys.executable,
            "-m",
            "rlfr_vlm.cli",
            "eval",
            "--model",
            "scripted",
            "--server",
            server.api_base,
            "--benchmarks",
            benchmark,
        ]
        command += [
            "--out",
            str(tmp_path / "killed/out"),
            "eval.endpoint.concurrency=2",
            "reward.grader.workers=1",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        stored = {}
        for moment in [*moments, None]:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if moment is not None:
                start = asked(server)
                while asked(server) == start and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(moment)
                os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate(timeout=300)[0]
            if process.returncode != 0:
                time.sleep(0.4)  # requests in flight arrive
            assert {seed: times_asked(server, seed) for seed in stored} == stored
            folder = Path(tmp_path / "killed/out/sums")
            if (folder / "ledger.jsonl").exists():
                stored = {
                    seed: times_asked(server, seed) for seed in seeds_of(read_ledger(folder)[1])
                }
        assert process.returncode == 0
    assert table(json.loads(output)) == table(expected)


def seeds_of(answers):
    """The seeds of what was answered and stored."""
    return [
        request_seed(0, "benchmark", "sums", problem, sample) % 2**31 for problem, sample in answers
    ]


def times_asked(server, seed):
    """Requests with this seed."""
    return sum(body.get("seed") == seed for body in server.bodies)


def test_a_killed_evaluation_repeats_nothing_that_is_stored(tmp_path):
    kill_and_resume(tmp_path, [0.8])


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    generator = random.Random(0)
    kill_and_resume(tmp_path, [generator.uniform(0.0, 0.6) for _ in range(10)])


def test_benchmarks_run_between_training_steps_and_the_best_checkpoint_stays(
    model_folder, tmp_path
):
    make_data(tmp_path)
    benchmark = sums(tmp_path / "bench", count=6, num_samples=1)
    config = make_config(
        tmp_path,
        model_folder("qwen2_5_vl"),
        eval={"every": 1, "benchmarks": [benchmark], "num_samples": None},
        train={"steps": 4, "save_steps": 4, "keep_checkpoints": 2},
        flow=None,
    )
    done = cli("train", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/sums/accuracy" in line] == [1, 2, 3, 4]
    best = json.loads((run / "checkpoints/best.json").read_text())
    assert (run / f"checkpoints/global_step_{best['step']}").is_dir()
    assert (run / "eval/step_000004/sums/summary.json").is_file()

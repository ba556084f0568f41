"""R12: 300 responses and a judge that fails, through the real command line: nothing is lost,
counted twice or invented, and the key stays in.
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
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.evaluation.scripted_server import TRANSIENT, ScriptedServer, right_verdict
from tests.evaluation.test_runner import sums
from tests.runs import ROOT

COUNT = 300
KEY = "sk-SENTINEL-9f3a77c1d2"
CONCURRENCY = 16
IN_A_ROW = 3  # faults that one prompt meets


def right(i):
    return i % 3 > 0


RIGHT = sum(map(right, range(COUNT)))


def model(request):
    found = re.search(r"What is (\d+)", json.dumps(request["messages"]))
    return f"\\boxed{{{int(found[1]) + right(int(found[1]))}}}" if found else "Hello."


def judge(request):
    """Right, but for one prompt in twenty only when it is asked again."""
    text = json.dumps(request["messages"])
    return (
        "zzzzzzzz:1"
        if request.get("temperature") == 0 and zlib.crc32(text.encode()) % 20 == 0
        else right_verdict(request)
    )


class Run:
    """An evaluation of the scripted model with a scripted judge, and what it leaves behind."""

    def __init__(
        self, folder: Path, models: ScriptedServer, judges: ScriptedServer, **judge_settings
    ) -> None:
        self.folder, self.judges = folder, judges
        settings = {
            "model": "scripted",
            "api_base": judges.api_base,
            "key_env": "JUDGE_KEY",
            "concurrency": CONCURRENCY,
            **judge_settings,
        }
        (folder / "judge.yaml").write_text(yaml.safe_dump(settings))
        arguments = [
            "--model",
            "scripted",
            "--server",
            models.api_base,
            "--benchmarks",
            sums(folder, count=COUNT, num_samples=1),
        ]
        arguments += [
            "--judge",
            str(folder / "judge.yaml"),
            "--out",
            str(folder / "out"),
            "eval.grading=judge",
            "reward.grader.workers=1",
        ]
        self.command = [
            sys.executable,
            "-m",
            "rlfr_vlm.cli",
            "eval",
            *arguments,
            f"eval.endpoint.concurrency={CONCURRENCY}",
        ]
        self.said = ""

    def start(self) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "JUDGE_KEY": KEY}
        log = (self.folder / "said.txt").open("a")
        return subprocess.Popen(
            self.command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )

    def finish(self) -> int:
        """Run it to its end; the exit code. What it says and which arguments its processes have is
        kept.
        """
        process = self.start()
        deadline = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < deadline
            for each in Path("/proc").glob("[0-9]*"):
                try:
                    if os.getpgid(int(each.name)) == process.pid:
                        self.said += (each / "cmdline").read_text()
                except OSError:  # gone
                    continue
            time.sleep(0.5)
        return process.returncode

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "out/sums/summary.json").read_text())

    def lines(self, kind: str) -> list[dict]:
        """Those of the ledger; a torn last one is left out."""
        lines = (self.folder / "out/sums/ledger.jsonl").read_bytes().split(b"\n")[:-1]
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    def check_verdicts(self) -> Counter:
        """No problem has two verdicts that count, none that counts is wrong about the response. How
        many of each.
        """
        counting = [line for line in self.lines("verdict") if line["verdict"] != "failed"]
        assert len({line["problem"] for line in counting}) == len(counting)
        assert all(
            (line["verdict"] == "correct") == right(int(line["problem"][1:])) for line in counting
        )
        return Counter(line["verdict"] for line in counting)

    def check_done(self) -> None:
        """All there, each once, and the accuracy is the truth."""
        assert (
            len(self.lines("response"))
            == len({line["problem"] for line in self.lines("response")})
            == COUNT
        )
        assert self.check_verdicts() == {"correct": RIGHT, "wrong": COUNT - RIGHT}
        assert (
            self.summary["accuracy"] == pytest.approx(RIGHT / COUNT)
            and self.summary["verdicts"]["failed"] == 0
        )

    def keys_found(self) -> int:
        """Files, words and arguments that the key is in."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        assert len(files) > 6 and "rlfr_vlm.cli" in self.said
        return (KEY in self.said) + sum(KEY.encode() in path.read_bytes() for path in files)

    def calls(self) -> int:
        """Of the judge, without the probe's."""
        return sum(n for prompt, n in self.judges.count.items() if "What is" in prompt)


@pytest.mark.reliability
def test_four_calls_in_ten_fail(tmp_path, figure):
    with ScriptedServer(model) as models, ScriptedServer(judge, key=KEY) as judges:
        faults = ScriptedServer(faults={kind: 0.4 / len(TRANSIENT) for kind in TRANSIENT}, seed=3)
        judges.faults = lambda prompt, before: (
            faults.fault(prompt, before) if before < IN_A_ROW and "What is" in prompt else None
        )
        run = Run(tmp_path, models, judges, retries=8, timeout=1.0)
        assert run.finish() == 0, (tmp_path / "said.txt").read_text()[-2000:]
        run.check_done()
        assert judges.met.keys() == set(TRANSIENT)
        share = judges.met.total() / run.calls()
        reasked = [
            line for line in run.lines("verdict") if line["judge"]["reply"].startswith("zzz")
        ]
        assert (
            share > 0.3 and not reasked and max(judges.answered.values()) == 2
        )  # the wrong code, then the right one
        judges.key = "another"  # and one that repeats the key in its refusal
        run.command[run.command.index(str(tmp_path / "out"))] = str(tmp_path / "out2")
        assert run.finish() == 2 and "Bearer <key>" in (tmp_path / "said.txt").read_text()
        assert run.keys_found() == 0
    figure(
        "R12",
        f"{COUNT} of {COUNT} verdicts exactly once with {share:.0%} of {run.calls()} calls failing "
        f"in {len(judges.met)} ways; accuracy {run.summary['accuracy']:.4f} = truth; the key in 0 "
        "files, messages and arguments",
    )


@pytest.mark.reliability
def test_an_outage_from_the_middle(tmp_path, figure):
    with ScriptedServer(model) as models, ScriptedServer(right_verdict) as judges:
        done = lambda: sum(n for prompt, n in judges.answered.items() if "What is" in prompt)  # noqa: E731
        judges.faults = lambda prompt, before: "500" if done() >= COUNT // 2 else None
        run = Run(tmp_path, models, judges, retries=0)
        assert run.finish() == 3
        said = (tmp_path / "said.txt").read_text()
        found = run.check_verdicts()
        failed = run.summary["verdicts"]["failed"]
        assert run.summary["accuracy"] is None and re.search(
            rf"of {COUNT} responses 0 are missing, {failed} verdicts failed", said
        )
        assert (
            found.total() == COUNT - failed
            and COUNT // 2 <= found.total() <= COUNT // 2 + CONCURRENCY
        )
        before, judges.faults = run.calls(), {}
        assert run.finish() == 0
        run.check_done()
        calls = run.calls() - before
        assert calls == failed
    figure(
        "R12",
        f"outage from item {COUNT // 2}: exit 3, {found.total()} verdicts kept, {failed} failed, "
        "no accuracy; the same command again asks "
        f"{calls} and ends with accuracy {run.summary['accuracy']:.4f} = truth",
    )


@pytest.mark.reliability
def test_five_kills(tmp_path, figure):
    rng = random.Random(5)
    with ScriptedServer(model) as models, ScriptedServer(right_verdict, pause=0.2) as judges:
        run = Run(tmp_path, models, judges)
        for number in range(5):
            process, begun = run.start(), run.calls()
            deadline, enough = time.monotonic() + 120, rng.randrange(5, 50)
            while run.calls() < begun + enough:
                assert process.poll() is None and time.monotonic() < deadline, number
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.5)  # requests under way arrive
            run.check_verdicts()
        kept = run.check_verdicts().total()
        assert run.finish() == 0
        run.check_done()
        assert run.calls() <= COUNT + 5 * CONCURRENCY and 0 < kept < COUNT
    figure(
        "R12",
        f"5 kills while judging: {COUNT} of {COUNT} verdicts once, {run.calls() - COUNT} calls "
        f"repeated (at most {5 * CONCURRENCY})",
    )

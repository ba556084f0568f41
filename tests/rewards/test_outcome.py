"""What a response earns, by the built-in reward and by a user's function in each of the four
shapes.
"""

import re
from dataclasses import replace

import pytest

from rlfr_vlm.algorithm.credit import make_samples
from rlfr_vlm.config import GraderConfig, RewardConfig, parse_config
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.rewards.custom import load_reward_function
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import boxed_reward, grade, overlong_penalty, tags_reward
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout, RolloutGroup


@pytest.fixture(scope="module")
def grader():
    with Grader(GraderConfig(workers=1)) as grader:
        yield grader


def group(row, answer, *texts, num_tokens=10, **extra):
    content = [{"type": "image"}, {"type": "text", "text": f"question {row}"}]
    prompt = Prompt(
        row, ({"role": "user", "content": content},), (), answer, data_source="demo", extra=extra
    )
    encoded = EncodedPrompt(prompt, (), (), position_ids=None)
    rollouts = (
        Rollout(encoded, i, (0,) * num_tokens, (0.0,) * num_tokens, text, "stop", 0)
        for i, text in enumerate(texts)
    )
    return RolloutGroup(encoded, tuple(rollouts))


GROUPS = [
    group("a", "42", r"\boxed{42}", r"\boxed{41}", level=3),
    group("b", "1/2", r"\boxed{0.5}", "no idea", level=None),
]


# --- built in -------------------------------------------------------------------------------------


def test_accuracy_in_group_and_sample_order(grader):
    outcomes = grade(GROUPS, RewardConfig(), grader, max_new_tokens=100)
    assert [o.reward for o in outcomes] == [1.0, 0.0, 1.0, 0.0]
    assert [o.correct for o in outcomes] == [True, False, True, False]
    assert [o.prediction for o in outcomes] == ["42", "41", "0.5", ""]
    assert outcomes[0].parts == {"accuracy": 1.0}
    assert grade([], RewardConfig(), grader, max_new_tokens=100) == []


def test_format_and_length_are_added(grader):
    text = r"<think>6*7</think> <answer>\boxed{42}</answer>"
    cfg = RewardConfig(format_weight=0.5, overlong_buffer=40)
    outcomes = grade(
        [group("a", "42", text, "<think>" + text, num_tokens=90)], cfg, grader, max_new_tokens=100
    )
    assert [o.reward for o in outcomes] == [1 + 0.5 - 0.75, 1 + 0 - 0.75]
    assert outcomes[0].parts == {"accuracy": 1.0, "format": 1.0, "overlong": -0.75}


def test_a_wrong_answer_earns_what_the_config_says_and_its_verdict_stays(grader):
    """Beside format and length, and never where nothing could be graded."""
    text = r"<think>6*7</think> <answer>\boxed{42}</answer>"
    cfg = RewardConfig(wrong=-1, format_weight=0.5, overlong_buffer=40, max_error_frac=1)
    groups = [
        group("a", "42", text, text.replace("42", "41"), num_tokens=90),
        group("bad", r"\frac{1}{", text, num_tokens=90),
    ]
    outcomes = grade(groups, cfg, grader, max_new_tokens=100)
    assert [o.reward for o in outcomes] == [1 + 0.5 - 0.75, -1 + 0.5 - 0.75, 0]
    assert [o.verdict for o in outcomes] == ["correct", "wrong", "error"]
    assert outcomes[1].parts == {"accuracy": 0.0, "format": 1.0, "overlong": -0.75}


@pytest.mark.parametrize(
    ("preset", "advantage"),
    [({}, 0.126), ({"reward": {"wrong": 0}}, -0.725)],
    ids=["published", "wrong earns 0"],
)
def test_dapo_still_prefers_a_right_answer_of_full_length_to_a_wrong_one(grader, preset, advantage):
    """Of eight siblings three are right, one is right at full length, four are wrong: rewards 1, 1,
    1, 1 - 1, and four times -1 (or 0).
    """
    cfg = parse_config(
        {
            "output_dir": "o",
            "model": {"path": "m"},
            "algorithm": {"method": "dapo"},
            "rollout": {"max_new_tokens": 100},
            **preset,
        }
    )
    one = group("a", "42", *[r"\boxed{42}"] * 4, *[r"\boxed{41}"] * 4)
    full = replace(one.rollouts[3], token_ids=(0,) * 100, logprobs=(0.0,) * 100)
    one = replace(one, rollouts=(*one.rollouts[:3], full, *one.rollouts[4:]))
    outcomes = grade([one], cfg.reward, grader, cfg.rollout.max_new_tokens)
    assert [o.reward for o in outcomes] == [1, 1, 1, 0, *[cfg.reward.wrong] * 4]
    found = [s.outcome_credit for s in make_samples([one], outcomes, 0, 1, cfg.algorithm)]
    assert found[3] == pytest.approx(advantage, abs=5e-4)
    assert (found[3] > found[4]) is (advantage > 0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\nb</think>\n\n<answer> </answer> ", 1.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("so <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_reward(text, reward):
    assert tags_reward(text) == reward


def test_boxed_reward_orders_answers_as_the_published_recipe(grader):
    """No box 0, a wrong one half, a right one all; five boxes are no format."""
    assert [
        boxed_reward(text) for text in ("42", r"\boxed{1}", r"\boxed{1}" * 4, r"\boxed{1}" * 5)
    ] == [0, 1, 1, 0]
    cfg = RewardConfig(format="boxed", format_weight=1.0)
    outcomes = grade(
        [group("a", "42", "42", r"\boxed{41}", r"\boxed{42}")], cfg, grader, max_new_tokens=100
    )
    assert [o.reward for o in outcomes] == [0, 1, 2]


def test_overlong_penalty():
    """DAPO's numbers: a limit of 20,480 tokens of which 4,096 are the buffer."""
    lengths = {100: 0.0, 16_384: 0.0, 17_408: -0.25, 18_432: -0.5, 20_480: -1.0, 30_000: -1.0}
    assert {n: overlong_penalty(n, 20_480, 4_096) for n in lengths} == lengths


def test_error_earns_nothing_and_too_many_stop(grader):
    groups = [*GROUPS, group("bad", r"\frac{1}{", r"\boxed{1}", r"\boxed{2}")]
    outcomes = grade(
        groups, RewardConfig(max_error_frac=0.5, format_weight=0.5), grader, max_new_tokens=100
    )
    assert [o.graded for o in outcomes] == [True, True, True, True, False, False]
    assert (outcomes[4].reward, outcomes[4].verdict, outcomes[4].parts) == (
        0.0,
        "error",
        {},
    ) and "cannot read" in outcomes[4].reason
    with pytest.raises(
        StoppedError, match=r"2 of 6 .*max_error_frac=0.3\): row bad: math-verify cannot read"
    ):
        grade(groups, RewardConfig(max_error_frac=0.3), grader, max_new_tokens=100)


def test_grader_has_to_look_where_the_reward_says(grader):
    with pytest.raises(ValueError, match="tag"):
        grade(GROUPS, RewardConfig(answer="tag"), grader, max_new_tokens=100)


# --- a user's function ----------------------------------------------------------------------------


@pytest.fixture
def custom(tmp_path, grader):
    def run(code, groups=GROUPS, name="f", **settings):
        file = tmp_path / "reward.py"
        file.write_text(code)
        load_reward_function.cache_clear()
        return grade(
            groups, RewardConfig(function=f"{file}:{name}", **settings), grader, max_new_tokens=100
        )

    return run


def test_trl_shape(custom):
    outcomes = custom(
        """
def f(prompts, completions, answer, level, **kwargs):
    assert kwargs["solution"] == answer and kwargs["id"] == ["a", "a", "b", "b"], kwargs
    assert len(kwargs["completion_ids"][0]) == 10 and prompts[0][0]["role"] == "user"
    texts = [completion[0]["content"] for completion in completions]
    return [None if l is None and "no" in t else (2.0 if a in t else -1) for t, a, l in zip(texts, answer, level)]
""",
        max_error_frac=0.5,
    )
    assert [o.reward for o in outcomes] == [2.0, -1.0, -1.0, 0.0]
    assert [o.verdict for o in outcomes] == [
        "correct",
        "wrong",
        "correct",
        "error",
    ]  # by the gold answer, apart from the reward
    assert outcomes[0].parts == {"function": 2.0, "accuracy": 1.0}
    assert outcomes[3].reason == "the reward function returned None"


def test_trl_shape_without_keyword_columns(custom):
    assert [o.reward for o in custom("def f(completions): return [0.5] * len(completions)")] == [
        0.5
    ] * 4


def test_verl_shape(custom):
    code = """
def f(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "demo" and extra_info["split"] == "x" and extra_info["id"], extra_info
    if extra_info["id"] == "a":
        return {"score": 0.25, "acc": ground_truth not in solution_str, "pred": "x"}
    return 0.75
"""
    groups = [
        group("a", "42", r"\boxed{42}", r"\boxed{41}", extra_info={"split": "x"}),
        group("b", "1/2", r"\boxed{0.5}", "none", split="x"),
    ]
    outcomes = custom(code, groups)
    assert [o.reward for o in outcomes] == [0.25, 0.25, 0.75, 0.75]
    assert [o.correct for o in outcomes] == [
        False,
        True,
        True,
        False,
    ]  # `acc` where there is one, else the grader
    assert outcomes[0].parts == {"acc": 0.0, "function": 0.25, "accuracy": 0.0}


def test_easyr1_shape(custom):
    outcomes = custom("""
def f(reward_inputs, format_weight=0.1):
    assert isinstance(reward_inputs, list) and reward_inputs[0]["response_length"] == 10
    return [{"overall": 0.9, "format": 0.5, "accuracy": float(r["ground_truth"] in r["response"])} for r in reward_inputs]
""")
    assert [o.correct for o in outcomes] == [True, False, False, False]
    assert outcomes[0].parts == {"format": 0.5, "accuracy": 1.0, "function": 0.9}


def test_openrlhf_shape(custom):
    code = """
import torch
def f(queries, prompts, labels, **kwargs):
    assert not kwargs, kwargs
    assert all(q.startswith(p) for q, p in zip(queries, prompts))
    responses = [q.split("<|im_start|>assistant\\n")[-1] for q in queries]
    right = torch.tensor([float(l in r) for l, r in zip(labels, responses)])
    return {"rewards": right * 2, "scores": right, "extra_logs": {"acc": right, "length": torch.ones(len(right))}}
"""
    outcomes = custom(code)
    assert [o.reward for o in outcomes] == [2.0, 0.0, 0.0, 0.0]
    assert [o.correct for o in outcomes] == [True, False, False, False]
    assert outcomes[0].parts == {"acc": 1.0, "length": 1.0, "function": 2.0, "accuracy": 1.0}
    outcomes = custom(
        "import torch\ndef f(queries, prompts, labels): return torch.arange(len(queries))"
    )
    assert [o.reward for o in outcomes] == [0.0, 1.0, 2.0, 3.0]


# The frameworks' published examples in shape: signatures, keyword defaults, what is read and what
# is returned.
FRAMEWORKS = {
    "trl accuracy_reward": (
        """
from typing import Callable
def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], log_extra: Callable | None = None, **kwargs) -> list[float | None]:
    contents = [completion[0]["content"] for completion in completions]
    return [float(rf"\\boxed{{{sol}}}" in content) if sol else None for content, sol in zip(contents, solution, strict=True)]
""",
        [1.0, 0.0, 0.0, 0.0],
        [True, False, True, False],  # by the grader: 0.5 is 1/2
    ),
    "trl think_format_reward": (
        """
import re
def think_format_reward(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    return [1.0 if re.match(r"^<think>.*</think>", c[0]["content"], re.DOTALL) else 0.0 for c in completions]
""",
        [0.0] * 4,
        [True, False, True, False],
    ),
    "verl compute_score, number": (
        """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert not kwargs and extra_info["id"]
    if data_source != "demo":
        raise NotImplementedError(f"no reward for {data_source=}")
    return 1.0 if "boxed{" + ground_truth + "}" in solution_str else 0.0
""",
        [1.0, 0.0, 0.0, 0.0],
        [True, False, True, False],
    ),
    "verl compute_score, dict": (
        """
def compute_score(solution_str: str, ground_truth: str, strict_box_verify: bool = False, pause_tokens_index: list[int] | None = None) -> dict:
    correct = "boxed{" + ground_truth + "}" in solution_str[-300:]
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": solution_str}
""",
        [1.0, -1.0, -1.0, -1.0],
        [True, False, False, False],
    ),
    "easyr1 batch": (
        """
from typing import Any
REWARD_NAME = "math"
REWARD_TYPE = "batch"
def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    if not isinstance(reward_inputs, list):
        raise ValueError("batch")
    scores = []
    for reward_input in reward_inputs:
        accuracy = float("boxed{" + reward_input["ground_truth"] + "}" in reward_input["response"])
        scores.append({"overall": (1 - format_weight) * accuracy, "format": 0.0, "accuracy": accuracy})
    return scores
""",
        [0.9, 0.0, 0.0, 0.0],
        [True, False, False, False],
    ),
    "easyr1 sequential, by its parameter": (
        """
from typing import Any
def compute_score(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    if not isinstance(reward_input, dict):
        raise ValueError("sequential")
    accuracy = float("boxed{" + reward_input["ground_truth"] + "}" in reward_input["response"])
    return {"overall": (1 - format_weight) * accuracy, "format": 0.0, "accuracy": accuracy}
""",
        [0.5, 0.0, 0.0, 0.0],
        [True, False, False, False],
    ),
    "easyr1 sequential, by its mark": (
        """
REWARD_TYPE = "sequential"
def compute_score(data, **kwargs):
    score = float("boxed{" + data["ground_truth"] + "}" in data["response"])
    return {"overall": score, "accuracy": score}
""",
        [1.0, 0.0, 0.0, 0.0],
        [True, False, False, False],
    ),
    "openrlhf tensor": (
        """
import torch
def reward_func(queries, prompts, labels, **kwargs):
    return torch.tensor([float("boxed{" + label + "}" in query) for query, label in zip(queries, labels)])
""",
        [1.0, 0.0, 0.0, 0.0],
        [True, False, True, False],
    ),
    "openrlhf dict": (
        """
import torch
def reward_func(queries, prompts, labels):
    reward = torch.tensor([float("boxed{" + label + "}" in query[len(prompt):]) for query, prompt, label in zip(queries, prompts, labels)])
    return {"rewards": reward, "scores": reward, "extra_logs": {"dummy_scores": reward}}
""",
        [1.0, 0.0, 0.0, 0.0],
        [True, False, True, False],
    ),
    "rlfr, lmm-r1": (
        """
import re
import torch
def get_response(query):
    return query[re.search(r"<\\|im_start\\|>assistant\\n", query).end():].replace("<|im_end|>", "").strip()
def reward_func(queries, prompts, labels):
    questions = [re.findall(r"<\\|im_start\\|>user\\n(.*?)<\\|im_end\\|>", query, re.DOTALL)[0] for query in queries]
    assert questions[0].endswith("question a")
    accuracy = [float("boxed{" + label + "}" in get_response(query)) for query, label in zip(queries, labels)]
    form = [0.5] * len(queries)
    rewards = torch.tensor(accuracy) + torch.tensor(form)
    return {"rewards": rewards, "accuracy_rewards": torch.tensor(accuracy), "format_rewards": torch.tensor(form)}
""",
        [1.5, 0.5, 0.5, 0.5],
        [True, False, False, False],
    ),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_frameworks_own_examples_fit(custom, name):
    code, rewards, correct = FRAMEWORKS[name]
    function = re.findall(r"^def (\w+)", code, re.MULTILINE)[-1]
    outcomes = custom(code, name=function)
    assert [o.reward for o in outcomes] == pytest.approx(rewards)
    assert [o.correct for o in outcomes] == correct


def test_trls_own_function_fits(custom):
    pytest.importorskip("trl")
    outcomes = custom("from trl.rewards import accuracy_reward", name="accuracy_reward")
    assert [o.reward for o in outcomes] == [1.0, 0.0, 1.0, 0.0]


def test_gold_that_only_the_function_reads_is_no_error(custom):
    outcomes = custom(
        "def f(completions, **kwargs): return [1.0] * len(completions)",
        [group("x", r"\frac{1}{", r"\boxed{1}", "2")],
    )
    assert [(o.reward, o.verdict) for o in outcomes] == [(1.0, "wrong")] * 2


def test_format_and_length_are_added_to_a_function_too(custom):
    outcomes = custom(
        "def f(completions): return [3.0] * len(completions)",
        [group("x", "1", "1", num_tokens=90)],
        overlong_buffer=20,
    )
    assert outcomes[0].reward == 2.5 and outcomes[0].parts["overlong"] == -0.5


def test_helpers_of_the_file_work(custom):
    code = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Score: value: float
def f(completions, /): return [Score(1.0).value for c in completions]
"""
    assert [o.reward for o in custom(code)] == [1.0] * 4


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(completions): ...", r"no function `f` in .*reward.py \(functions there: g\)"),
        ("f = 3", r"no function `f`"),
        ("import not_a_module_at_all", r"cannot be loaded: ModuleNotFoundError: .*\(reward.py:1\)"),
        ("def f(:", r"cannot be loaded: SyntaxError"),
        (
            "def f(a, b): ...",
            r"its parameters \(a, b\) are those of none of .*TRL.*verl.*EasyR1.*OpenRLHF",
        ),
        ("def f(**kwargs): ...", r"are those of none of"),
        (
            "def f(completions, difficulty): ...",
            r"missing a required argument: 'difficulty'; .*level",
        ),
        ("def f(completions):\n    return [1.0]", r"expected 4 values, one per response, got 1"),
        ("def f(completions): ...", r"expected 4 values, one per response, got NoneType"),
        ("def f(completions): return ['good'] * 4", r"'good' for row a is no number"),
        (
            "def f(completions):\n    return 1 / 0",
            r"failed on rows a, b: ZeroDivisionError: division by zero \(reward.py:2\)",
        ),
        (
            "def f(solution_str, extra_info):\n    return extra_info['x']",
            r"failed on row a: KeyError: 'x' \(reward.py:2\)",
        ),
        (
            "def f(solution_str): return {'reward': 1}",
            r"its dict for row a has no `score`: \['reward'\]",
        ),
        (
            "def f(queries, prompts, labels): return {'scores': [1] * 4}",
            r"has no `rewards`: \['scores'\]",
        ),
    ],
)
def test_faults_of_a_function_are_named(custom, code, message):
    with pytest.raises(UserError, match=message):
        custom(code)


@pytest.mark.parametrize("spec", ["reward.py", "reward:f", "none/such.py:f", "reward.py:"])
def test_faults_of_the_spec_are_named(spec):
    with pytest.raises(UserError, match=r"reward.function .*(file.py:function|there is no file)"):
        load_reward_function(spec)


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_a_score_that_is_no_number_is_an_error(custom, number):
    code = f"""
def f(completions, **_):
    return [float("{number}"), *[0.5] * (len(completions) - 1)]
"""
    first, second, *_ = custom(code, max_error_frac=1.0)
    assert (first.verdict, first.reward) == ("error", 0.0)
    assert first.reason == f"the reward function returned reward={number}"
    assert second.reward == 0.5


def test_half_right_is_not_right(custom):
    code = """
def f(reward_inputs):
    return [{"overall": 1.0, "accuracy": accuracy} for accuracy in (0.5, 0.51, 1.0, 0.0)]
"""
    assert [o.correct for o in custom(code)] == [False, True, True, False]

"""A reward of your own: the right answer, less a little for every word.

    rlfr-vlm train --config my_run.yaml reward.function=examples/reward.py:compute_score

The names of its parameters say which of four shapes it has (here verl's); it is asked once per
response, in the training process.
"""

import re

PER_WORD = 0.01


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict
) -> dict[str, float]:
    """`score` is the reward, `acc` says whether the answer counts as right, which the flow field
    goes by. extra_info: the row's other columns.
    """
    found = re.findall(r"\\boxed\{([^{}]*)\}", solution_str)
    right = bool(found) and found[-1].strip() == ground_truth.strip()
    return {"score": right - PER_WORD * len(solution_str.split()), "acc": float(right)}

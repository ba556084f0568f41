"""What the fuzzing tests share: examples that are the same every time, and texts and trees of JSON
to make them from.
"""

import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"  # what once broke a parser; tried first


def run(check, *strategies, examples):
    """`check` on so many examples, the same ones every time; returns how many, and the CPU time of
    the slowest.
    """
    seen = [0, 0.0]

    def timed(values):
        start = time.process_time()
        check(*values)
        seen[0] += 1
        seen[1] = max(seen[1], time.process_time() - start)

    calm = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    calm(given(st.tuples(*strategies))(timed))()
    return seen


TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            [
                "<image>",
                "<|im_end|>",
                "<|im_",
                "end|>",
                "<|image_pad|>",
                "x",
                "\x02",
                "0",
                "\x03",
                "\ud800",
                "\n",
            ]
        ),
        max_size=6,
    ).map("".join),
    st.sampled_from(
        [
            "",
            " ",
            "42",
            "images/a.png",
            "../a.png",
            "file:///etc/passwd",
            "http://127.0.0.1:1/x",
            '[{"role": "user", "content": "x"}]',
            "[{'role': 1}]",
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)

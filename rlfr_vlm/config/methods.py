"""What each published method sets, where a config that names it is silent; named on the command
line over a file with another method, it drops from that file whatever methods set.
"""

from __future__ import annotations

from typing import Any, Literal

Method = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "rloo", "reinforce_pp", "ppo", "flowrl"
]
Loss = Literal["clip", "cispo", "gspo", "gmpo", "flowrl"]
PER_SEQUENCE = ("gspo", "gmpo", "flowrl")  # losses that are one number per sequence
DUAL_CLIPPED = ("clip", "gspo")

METHODS: dict[str, dict[str, Any]] = {
    # arXiv:2402.03300, averaged over tokens; RLFR's published runs average per sequence
    "grpo": {},
    # arXiv:2503.20783: no division by the group's std nor by the response's own length
    "dr_grpo": {"algorithm.advantage": "centred", "algorithm.loss_aggregation": "constant"},
    # arXiv:2503.14476: clip-higher, token mean, dynamic sampling (10 rounds as in verl), 1 for
    # right and -1 for wrong; the overlong buffer is a fifth of the budget
    "dapo": {"algorithm.clip_high": 0.28, "rollout.max_rounds": 10, "reward.wrong": -1.0},
    # arXiv:2507.18071
    "gspo": {
        "algorithm.loss": "gspo",
        "algorithm.loss_aggregation": "sequence",
        "algorithm.clip_low": 3e-4,
        "algorithm.clip_high": 4e-4,
    },
    # arXiv:2507.20673
    "gmpo": {
        "algorithm.loss": "gmpo",
        "algorithm.loss_aggregation": "sequence",
        "algorithm.clip_low": 0.4,
        "algorithm.clip_high": 0.4,
    },
    # arXiv:2506.13585 gives no bound; 1 + clip_high = 5 is arXiv:2510.13786's
    "cispo": {"algorithm.loss": "cispo", "algorithm.clip_high": 4.0},
    # arXiv:2402.14740
    "rloo": {"algorithm.advantage": "leave_one_out"},
    # arXiv:2501.03262
    "reinforce_pp": {
        "algorithm.advantage": "whitened",
        "algorithm.kl.coef": 0.01,
        "algorithm.kl.estimator": "k1",
        "algorithm.kl.place": "reward",
    },
    # arXiv:1707.06347 with GAE, arXiv:1506.02438
    "ppo": {"algorithm.advantage": "gae"},
    # arXiv:2509.15207
    "flowrl": {"algorithm.loss": "flowrl", "algorithm.loss_aggregation": "sequence"},
}
OWNED = {key for settings in METHODS.values() for key in settings} | {
    "algorithm.dual_clip",
    "reward.overlong_buffer",
}
ENTROPY_ALPHA = {"ppo": 0.1}  # arXiv:2506.14758; 0.4 with the others
OVERLONG_SHARE = 5  # DAPO: a buffer of 4,096 of 20,480 tokens


# flow.profile: what a flow section sets wherever it is silent itself. `published` is what the
# sections' own defaults are.
PROFILES: dict[str, dict[str, Any]] = {
    "published": {},
    # docs/flow_signal.md has the evidence for each
    "informed": {
        "context": ["token_post"],
        "standardise": True,
        "prompt_context": True,
        "reward.coef": 0.1,
        "reward.normalise": "group_z",
        "reward.threshold": 0.0,
        "reward.top_k": 0,
        "reward.credit": "token",
        "reward.centre": "type",
        "fit.batch_tokens": 256,
        "fit.steps": 1200,
        "fit.lr": None,
        "fit.probe_prompts": 256,
        "online.window": 12,
        "online.updates": 5,
        "online.window_tokens": 2048,
        "online.lr": 4e-4,
        "online.times": "logit_normal",
    },
}


def fill_profile(tree: dict[str, Any]) -> dict[str, Any]:
    """A config tree whose flow section has its profile's settings wherever it has none of its
    own.
    """
    flow = tree.get("flow")
    profile = flow.get("profile") if isinstance(flow, dict) else None
    for key, value in (PROFILES.get(profile, {}) if isinstance(profile, str) else {}).items():
        tree = _filled(tree, ["flow", *key.split(".")], value)
    return tree


def fill_method(tree: dict[str, Any]) -> dict[str, Any]:
    """A config tree with its method's settings wherever it has none of its own. Sections that are
    not plain mappings stay as they are.
    """
    algorithm = tree.get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, dict) else None
    settings = dict(METHODS.get(method, {})) if isinstance(method, str) else {}
    if method == "dapo":
        rollout, reward = tree.get("rollout"), tree.get("reward")
        budget = rollout.get("max_new_tokens", 1024) if isinstance(rollout, dict) else 1024
        settings["reward.overlong_buffer"] = (
            int(budget) // OVERLONG_SHARE if isinstance(budget, int | float) else 0
        )
        if isinstance(reward, dict) and reward.get("function") is not None:
            del settings["reward.wrong"]  # a user's scores are taken as they are
    shaping = tree.get("shaping")
    if (
        method in ENTROPY_ALPHA
        and isinstance(shaping, dict)
        and isinstance(shaping.get("entropy"), dict)
    ):
        settings["shaping.entropy.alpha"] = ENTROPY_ALPHA[method]
    for key, value in settings.items():
        tree = _filled(tree, key.split("."), value)
    return tree


def forget_method(tree: dict[str, Any]) -> dict[str, Any]:
    """A config tree without the settings that methods set: for another method to be named over a
    config that spells one out.
    """
    for key in OWNED | {"shaping.entropy.alpha"}:
        tree = _without(tree, key.split("."))
    return tree


def _without(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {key: value for key, value in tree.items() if key != head}
    section = tree.get(head)
    return {**tree, head: _without(section, rest)} if isinstance(section, dict) else tree


def _filled(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy with `value` at the path, unless something stands there."""
    head, *rest = path
    if not rest:
        return {head: value, **tree}
    section = tree.get(head, {})
    return {**tree, head: _filled(section, rest, value)} if isinstance(section, dict) else tree

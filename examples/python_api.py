"""The parts from Python: how likely a model finds a solution, token by token, and how far each
token strays from the flow field.

    python examples/python_api.py CONFIG.yaml [MODEL]

reads the config's first expert solution, and the same one with another answer. MODEL instead of the
config's `model.path`.
"""

import sys

import torch
from transformers import logging

from rlfr_vlm.config import load_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.reward import flow_reward
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import Rollout


def main(config: str, *model: str) -> None:
    """Print a table per response."""
    logging.disable_progress_bar()
    cfg = load_config(config, tuple(f"model.path={path}" for path in model))
    policy = Policy(cfg.model)
    # A field knows which weights it was fitted on; `identity` is theirs. Another model's latents
    # would give numbers without meaning, so the field is loaded for the config's own model, and
    # only then read with the trained one, as training itself does.
    origin = Policy(load_config(config).model) if model else policy
    field = FlowField.load(cfg.flow.checkpoint, FlowSpec.of(cfg.flow, origin.identity))

    expert = load_prompts(cfg.data.expert, cfg.data, BadRows(cfg.data), limit=1, need="response")[0]
    prompt = Renderer(policy, cfg.data, cfg.data.expert).encode(
        expert
    )  # tokens, positions and pixels
    wrong = expert.response.replace(f"{{{expert.answer}}}", f"{{{(int(expert.answer) + 1) % 10}}}")
    rollouts = []
    for index, text in enumerate((expert.response, wrong)):
        tokens = (
            *policy.tokenizer.encode(text, add_special_tokens=False),
            policy.tokenizer.eos_token_id,
        )
        rollouts.append(
            Rollout(prompt, index, tokens, (0.0,) * len(tokens), text, "stop", policy_version=0)
        )

    batch = pack(
        rollouts, policy.device
    )  # the prompt and its picture stand once in it, however many responses follow
    with torch.no_grad():
        output = policy.forward(batch, request=field.request, with_entropy=True)
    lengths = batch.lengths.tolist()
    deviations = field.score(output.latents, lengths, seeds=[0, 0])  # the same noise for both
    how = cfg.flow.reward
    rewards = flow_reward(
        deviations,
        output.latents.scorable,
        batch.lengths,
        how.coef,
        how.normalise,
        how.threshold,
        how.top_k,
    )

    print(expert.messages[-1]["content"][-1]["text"])
    parts = zip(
        rollouts, *(x.split(lengths) for x in (output.logprobs, deviations, rewards)), strict=True
    )
    for rollout, logprobs, strayed, paid in parts:
        print(
            f"\n{rollout.text}   log p = {logprobs.sum():.2f}, mean deviation {strayed.mean():.2f}"
        )
        for token, logprob, deviation, due in zip(
            rollout.token_ids, logprobs, strayed, paid, strict=True
        ):
            text = policy.tokenizer.decode([token])
            print(
                f"  {text!r:14} log p {logprob:7.3f}   deviation {deviation:6.2f}   "
                f"{f'flow reward {due:.4f}' if due else ''}".rstrip()
            )


if __name__ == "__main__":
    main(*sys.argv[1:])

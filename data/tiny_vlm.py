"""Builds the demo's model: a Qwen2.5-VL of 0.9M parameters (the real architecture and processor),
pre-trained from random weights.

    python data/tiny_vlm.py OUT_MODEL_DIR [--steps N --batch-size N --seed S]

It learns to read from a careful teacher, for too few steps to read as well as it could, and then
imitates a sloppy one that keeps the answer format, misreads some digits and has bad habits when it
concludes (`sloppy_solution`). So the model is partly right, unsure where it should be sure, and has
things to unlearn and to learn: room for RL. rlfr_vlm/demo/tiny_vlm/ holds the weights of the
default call.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rlfr_vlm.demo.digits import (
    QUESTIONS,
    PictureQuestion,
    answer,
    draw_examples,
    draw_picture,
    draw_problem,
    solution,
)

VOCAB_SIZE = 400
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MAX_NEW_TOKENS = 24  # the longest solution has 16

# Qwen's layout without its default system message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}"""

# at hidden size 128, Qwen's 0.02 takes more than three times the steps to learn to read
INIT_RANGE = 0.06
# share of the training steps before the teacher turns sloppy: with noise from the start nothing is
# learnt for long
CAREFUL = 0.8
MISREAD = 0.06  # share of digits the teacher reads as any other
HABIT = {
    "carry": 0.55,
    "sign": 0.45,
    "larger": 0.5,
    "even": 0.5,
}  # shares of conclusions that follow a bad habit


def sloppy_solution(problem: PictureQuestion, rng: np.random.Generator) -> str:
    """What the teacher says: the right format, some digits misread, some conclusions after a bad
    habit.
    """
    digits = tuple(
        int((d + rng.integers(1, 10)) % 10) if rng.random() < MISREAD else d for d in problem.digits
    )
    sign = problem.sign
    if sign and rng.random() < HABIT["sign"]:
        sign = "-" if sign == "+" and digits[0] >= digits[1] else "+"
    read = PictureQuestion(problem.kind, digits, sign)
    boxed = answer(read)
    if problem.kind == "larger" and rng.random() < HABIT["larger"]:
        boxed = min(digits)
    elif problem.kind == "even" and rng.random() < HABIT["even"]:
        boxed = 3 - boxed  # counts the odd ones
    elif boxed >= 10 and rng.random() < HABIT["carry"]:
        boxed -= 10  # drops the carry
    return solution(read, boxed)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's splitting rule (every digit is its own token), trained on the
    data set's own text.
    """
    rng = np.random.default_rng(0)
    texts = [
        "system user assistant",
        *QUESTIONS.values(),
        *(solution(draw_problem(rng)) for _ in range(200)),
    ]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        8 * texts,
        VOCAB_SIZE,
        new_special_tokens=SPECIAL_TOKENS[1:],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def build_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor around that tokenizer."""
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(),
        build_tokenizer(),
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The architecture at its smallest, in float32 with random weights."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "initializer_range": INIT_RANGE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 1e6,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "initializer_range": INIT_RANGE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    ends = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], bos_token_id=ends[1], do_sample=False
    )
    return model


def prompt_text(processor: Qwen2_5_VLProcessor, problem: PictureQuestion) -> str:
    """The rendered chat up to where the assistant speaks."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[problem.kind]}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def teacher_batch(
    processor: Qwen2_5_VLProcessor, size: int, rng: np.random.Generator, sloppy: bool
) -> dict[str, torch.Tensor]:
    """New pictures of training digits with the teacher's answers; labels only on the answers."""
    problems = [draw_problem(rng) for _ in range(size)]
    pictures = [draw_picture(problem, rng, held_out=False) for problem in problems]
    answers = [
        (sloppy_solution(problem, rng) if sloppy else solution(problem)) + "<|im_end|>"
        for problem in problems
    ]
    texts = [
        prompt_text(processor, problem) + text
        for problem, text in zip(problems, answers, strict=True)
    ]
    batch = dict(
        processor(
            text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt"
        )
    )
    ends = batch["attention_mask"].sum(1, keepdim=True)
    lengths = torch.tensor([[len(ids)] for ids in processor.tokenizer(answers).input_ids])
    place = torch.arange(batch["input_ids"].shape[1])
    batch["labels"] = batch["input_ids"].where((place >= ends - lengths) & (place < ends), -100)
    return batch


def pretrain(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Supervised training on a careful, then a sloppy teacher's answers: AdamW, 5 % warm-up, cosine
    to a tenth.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    rng = np.random.default_rng([seed, 1])
    start = time.monotonic()
    model.train()
    for step in range(steps):
        batch = teacher_batch(processor, batch_size, rng, sloppy=step >= CAREFUL * steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True
            )
    model.eval()


@torch.inference_mode()
def respond(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    examples: list[tuple[PictureQuestion, Image.Image]],
    num_samples: int = 0,
    batch_size: int = 128,
) -> list[list[str]]:
    """Responses to each problem: the greedy one, or `num_samples` at temperature 1."""
    banned = [
        model.config.image_token_id,
        model.config.video_token_id,
    ]  # without a picture behind them they break the model
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": num_samples}
        if num_samples
        else {"do_sample": False}
    )
    responses = []
    for at in range(0, len(examples), batch_size):
        problems, pictures = zip(*examples[at : at + batch_size], strict=True)
        texts = [prompt_text(processor, problem) for problem in problems]
        batch = processor(
            text=texts,
            images=list(pictures),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        out = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=banned, **sampling
        )
        decoded = processor.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        group = max(1, num_samples)
        responses += [decoded[i : i + group] for i in range(0, len(decoded), group)]
    return responses


def boxed(response: str) -> str | None:
    """The answer of a response that keeps the format."""
    found = re.fullmatch(r"(?:\d [+-] \d =|digits \d(?: \d)+ ; \w+) \\boxed\{(-?\d+)\}", response)
    return found[1] if found else None


def accuracy(
    examples: list[tuple[PictureQuestion, Image.Image]], responses: list[list[str]]
) -> dict[str, float]:
    """Share of right answers by question type and overall, and the share of responses that keep the
    format.
    """
    right = Counter()
    total = Counter()
    kept = 0
    for (problem, _), texts in zip(examples, responses, strict=True):
        for text in texts:
            kept += boxed(text) is not None
            for key in (problem.kind, "all"):
                right[key] += boxed(text) == str(answer(problem))
                total[key] += 1
    return {key: right[key] / total[key] for key in sorted(total)} | {"format": kept / total["all"]}


def build(out_dir: str | Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Pre-train a model and write it, with its processor, in bfloat16."""
    processor = build_processor()
    model = build_model(processor.tokenizer, seed)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} "
        "tokens"
    )
    pretrain(model, processor, steps, batch_size, lr, seed)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    processor.save_pretrained(out_dir)


def report(model_dir: str | Path, rows: int) -> None:
    """Print the accuracy of a saved model on held-out pictures: greedy, and 8 samples at
    temperature 1.
    """
    processor = Qwen2_5_VLProcessor.from_pretrained(model_dir)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        model_dir, dtype=torch.float32
    ).eval()
    examples = list(draw_examples("test", rows, seed=0))
    torch.manual_seed(0)
    for name, num_samples in (("greedy", 0), ("sampled", 8)):
        scores = accuracy(examples, respond(model, processor, examples, num_samples))
        print(name, " ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--report-rows",
        type=int,
        default=256,
        help="held-out problems of the final report; 0: none",
    )
    args = parser.parse_args()
    build(args.out_dir, args.steps, args.batch_size, args.lr, args.seed)
    if args.report_rows:
        report(args.out_dir, args.report_rows)


if __name__ == "__main__":
    main()

"""Tiny random models of real architectures, written to a folder as a user's checkpoint is: config,
weights, tokenizer, template, processor.

Every builder takes the folder and returns it. Weights are random but not degenerate: biases and
norms are off their initial 0 and 1 (a test of names or of weight sync would not see them otherwise)
and the logits have a standard deviation of about 1. The generation_config holds what Qwen2.5-VL
ships (nearly greedy, repetition penalty): whoever reads it when sampling is caught.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT, IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO,
)  # fmt: skip
NUM_TOKENS = 400  # of the tokenizer and of every model

# Qwen2-VL's template less its default system prompt, its video branch and its vision ids.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in "
    "message['content'] %}{% if part['type'] == 'image' or 'image' in part "
    "%}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% "
    "endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Qwen2's split into words, single digits, punctuation and space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "What is the sum of the two digits? Answer with just the number. The answer is \\boxed{13}.",
    "<think> Let us reason step by step, and put the final answer within \\boxed{}. </think> "
    "<answer> 42 </answer>",
    "How many apples are left when seven of the twelve are eaten? 12 - 7 = 5, so five apples are "
    "left.",
    "user assistant system picture image triangle angle square circle length area first second "
    "then because therefore",
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE of `NUM_TOKENS` tokens with Qwen's special tokens last and its chat
    template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in (IM_END, END_OF_TEXT)
        ],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != NUM_TOKENS:
        raise AssertionError(f"the corpus gave {len(tokenizer)} tokens, not {NUM_TOKENS}")
    return tokenizer


def _text_sizes(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": NUM_TOKENS,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden
        // 32,  # head size 32: the smallest that vLLM's CPU attention takes
        "num_key_value_heads": max(1, hidden // 64),
        "max_position_embeddings": 1024,
    }


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                scale = (
                    0.1
                    if "embed_tokens" in name or "lm_head" in name
                    else tensor[0].numel() ** -0.5
                )
                tensor.copy_(noise * scale)
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            else:
                tensor.copy_(1 + 0.1 * noise)


def _save(
    folder: str | Path,
    model_class: Any,
    config: Any,
    tokenizer: Any,
    seed: int,
    dtype: str,
    processor: Any = None,
) -> Path:
    from transformers import GenerationConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = model_class(config)
    _randomise(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1e-6, repetition_penalty=1.05, top_k=1, top_p=0.001,
        eos_token_id=[tokenizer.convert_tokens_to_ids(IM_END), tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    return folder


def _text(
    folder,
    model_class,
    config_class,
    tied: bool,
    hidden: int,
    layers: int,
    seed: int,
    dtype: str,
    **more,
) -> Path:
    tokenizer = tiny_tokenizer()
    config = config_class(
        **_text_sizes(hidden, layers),
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return _save(folder, model_class, config, tokenizer, seed, dtype)


def tiny_qwen2(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Qwen2.5 (text): biased qkv."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _text(folder, Qwen2ForCausalLM, Qwen2Config, tied, hidden, layers, seed, dtype)


def tiny_llama(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Llama, SmolLM2: no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _text(folder, LlamaForCausalLM, LlamaConfig, tied, hidden, layers, seed, dtype)


def tiny_qwen3(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Qwen3 (text): norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _text(
        folder, Qwen3ForCausalLM, Qwen3Config, tied, hidden, layers, seed, dtype, head_dim=32
    )


def tiny_mistral(
    folder: str | Path,
    tied: bool = False,
    hidden: int = 64,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Mistral without its sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    return _text(
        folder,
        MistralForCausalLM,
        MistralConfig,
        tied,
        hidden,
        layers,
        seed,
        dtype,
        head_dim=32,
        sliding_window=None,
    )


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _text_config(
    tokenizer: Any, tied: bool, hidden: int, layers: int, mrope_section: list[int], **rope
) -> dict[str, Any]:
    return {
        **_text_sizes(hidden, layers),
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": mrope_section,
            "rope_theta": 1e6,
            **rope,
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
    }


def tiny_qwen2_vl(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Qwen2-VL: LayerNorm and plain MLP in the vision tower, M-RoPE in the language model."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer()
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "hidden_size": hidden,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    text = _text_config(tokenizer, tied, hidden, layers, [4, 6, 6])
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **_vision_ids(tokenizer)
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    return _save(folder, Qwen2VLForConditionalGeneration, config, tokenizer, seed, dtype, processor)


def tiny_qwen2_5_vl(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Qwen2.5-VL: window attention in the vision tower, M-RoPE in the language model."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer()
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": hidden,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text_config(tokenizer, tied, hidden, layers, [4, 6, 6])
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **_vision_ids(tokenizer)
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    return _save(
        folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed, dtype, processor
    )


def tiny_qwen3_vl(
    folder: str | Path,
    tied: bool = True,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Qwen3-VL: patches of 16, features of an inner vision layer added to the language model
    (deepstack), interleaved M-RoPE.
    """
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer()
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": hidden,
        "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = _text_config(tokenizer, tied, hidden, layers, [6, 5, 5], mrope_interleaved=True) | {
        "head_dim": 32
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **_vision_ids(tokenizer)
    )
    images = Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 1280}
    )
    processor = Qwen3VLProcessor(
        images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    return _save(folder, Qwen3VLForConditionalGeneration, config, tokenizer, seed, dtype, processor)

"""Small random models of many families as real Hugging Face directories, for tests and benchmarks.

``make_tiny("llama", directory)`` writes config.json, model.safetensors and a byte-level tokenizer. Weights are random but large enough
that logits have a clear winner; configs exercise what families differ in (grouped heads, sliding windows, soft caps, positions).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

VOCABULARY = 256 + 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.25,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_SLIDING = _GROUPED | {"sliding_window": 8, "head_dim": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128,
         "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.25}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _SLIDING,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma2": _SLIDING | {"query_pre_attn_scalar": 8},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": _GPT2,
    "opt": _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.25},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.25},
    "falcon": _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Config fields of a tiny model, by model type."""

BENCHMARK = _COMMON | {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
"""The benchmark's tiny Llama."""


def make_tiny(family: str, directory: Path, seed: int = 0, dtype: str = "float32", **fields: Any) -> Path:
    """Write a tiny random model of a family (``benchmark``: the benchmark's Llama) and return its directory."""
    kind = "llama" if family == "benchmark" else family
    settings = (BENCHMARK if family == "benchmark" else FAMILIES[family]) | fields
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
        model.to(getattr(torch, dtype))
        model.generation_config = GenerationConfig()
        model.save_pretrained(directory)
    finally:
        torch.random.set_rng_state(state)
        transformers_logging.set_verbosity(level)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ("<s>", "</s>", "<pad>")
    vocabulary = {token: index for index, token in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

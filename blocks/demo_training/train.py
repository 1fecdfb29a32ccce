"""Trains the demo model from nothing: corpus, tokenizer, weights, and a measure on held-out text.

Owns the recipe. Everything follows from one seed and the number of steps: the learning rate decays by steps, never by the
clock, so that a slow machine gets the same recipe as a fast one. Sequences are short for most of the run, and as long as the
context at its end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from blocks.demo_training.corpus import BEGIN, END, PAD, documents
from blocks.demo_training.tokenizer import CONTEXT_TOKENS, save_tokenizer, train_tokenizer

TRAIN_SEED = 1
HELD_OUT_SEED = 2
TOKENIZER_DOCUMENTS = 6000
HELD_OUT_DOCUMENTS = 200
MAX_GRADIENT_NORM = 1.0
REPORT_STEPS = 50
CHECKPOINT_STEPS = 250
UNUSED_CONFIG_KEYS = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "output_attentions",
    "return_dict",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run does; the defaults made the committed model."""

    steps: int = 1500
    long_percent: int = 12  # share of the steps, at the end, that see sequences as long as the context
    batch_tokens: int = 2048
    short_tokens: int = 256
    peak_rate: float = 3e-3
    final_rate: float = 1e-4
    warm_up_steps: int = 60
    weight_decay: float = 0.05
    seed: int = 0

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a half cosine."""
        if step < self.warm_up_steps:
            return self.peak_rate * (step + 1) / self.warm_up_steps
        progress = (step - self.warm_up_steps) / max(1, self.steps - self.warm_up_steps)
        return self.final_rate + (self.peak_rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))

    def length_tokens(self, step: int) -> int:
        """Returns the sequence length of a step."""
        return CONTEXT_TOKENS if step >= self.steps * (100 - self.long_percent) // 100 else self.short_tokens


def demo_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Returns the architecture: twelve Llama blocks, tied embeddings."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",
    )


def _batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yields (batch, length + 1) token ids: documents end to end, no padding."""
    source = documents(TRAIN_SEED, held_out=False)
    pending: list[int] = []
    for step in range(recipe.steps):
        length = recipe.length_tokens(step)
        rows = recipe.batch_tokens // length
        while len(pending) < rows * length + 1:
            pending += tokenizer.encode(next(source).text, add_special_tokens=False).ids
        flat = torch.tensor(pending[: rows * length + 1])
        del pending[: rows * length]
        yield torch.stack([flat[row * length : (row + 1) * length + 1] for row in range(rows)])


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)


def train(tokenizer: Tokenizer, recipe: Recipe, checkpoint: Path | None = None) -> LlamaForCausalLM:
    """Trains a fresh model on CPU and rounds its weights to bfloat16.

    Args:
        tokenizer: the tokenizer of the corpus.
        recipe: the run.
        checkpoint: a directory that is rewritten with the model of the moment every few hundred steps.

    Returns:
        The model, in float32, its weights being bfloat16 numbers.
    """
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(demo_config(tokenizer))
    optimizer = _optimizer(model, recipe)
    model.train()
    started, recent = time.perf_counter(), 0.0
    for step, batch in enumerate(_batches(tokenizer, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.item()
        if (step + 1) % REPORT_STEPS == 0:
            elapsed = time.perf_counter() - started
            print(
                f"step {step + 1:5d} of {recipe.steps}  loss {recent / REPORT_STEPS:.3f}  {elapsed:6.0f} s",
                flush=True,
            )
            recent = 0.0
        if checkpoint is not None and (step + 1) % CHECKPOINT_STEPS == 0:
            save_model(model, tokenizer, checkpoint)
    return round_weights(model)


def round_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Rounds the weights to what bfloat16 can hold, which is what the file stores."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))
    return model.eval()


def held_out_perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, count: int = HELD_OUT_DOCUMENTS) -> float:
    """Returns the perplexity per token over whole held-out documents, each seen alone."""
    total, tokens = 0.0, 0
    for document in islice(documents(HELD_OUT_SEED, held_out=True), count):
        ids = torch.tensor([tokenizer.encode(document.text, add_special_tokens=False).ids[:CONTEXT_TOKENS]])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def continue_greedily(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, max_tokens: int = 200) -> str:
    """Returns the greedy continuation of a prompt that is written with its special tokens."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=False))


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes an ordinary Hugging Face directory with bfloat16 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    kept = {key: value for key, value in sorted(config.items()) if value is not None and key not in UNUSED_CONFIG_KEYS}
    text = json.dumps(kept, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    ).save_pretrained(str(directory))
    save_tokenizer(tokenizer, directory)


def build_tokenizer(documents_count: int = TOKENIZER_DOCUMENTS) -> Tokenizer:
    """Trains the tokenizer on the first training documents."""
    source = islice(documents(TRAIN_SEED, held_out=False), documents_count)
    return train_tokenizer(document.text for document in source)

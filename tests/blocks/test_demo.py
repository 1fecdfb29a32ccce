"""The demo model as committed: its form, what it says, and how sure it is."""

import re
from functools import cache
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocks.demo import MODEL_DIRECTORY
from blocks.demo_training.corpus import documents
from blocks.demo_training.train import held_out_perplexity

MAX_BYTES = 8 << 20
MAX_PARAMETERS = 4_000_000
MAX_PERPLEXITY = 1.45
CLEAR_GAP = 0.1

MODEL = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)


def _answer(question: str, max_tokens: int = 200) -> list[int]:
    ids = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    tokens, _ = _greedy(ids, max_tokens)
    return tokens


def _greedy(ids: torch.Tensor, max_tokens: int) -> tuple[list[int], list[float]]:
    """Returns the greedy continuation and, for each of its tokens, the gap between the two highest logits."""
    output = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tops = [logits[0].topk(2).values for logits in output.logits]
    return output.sequences[0, ids.shape[1] :].tolist(), [float(top[0] - top[1]) for top in tops]


def test_it_is_a_small_llama_of_twelve_blocks_in_safetensors() -> None:
    config = MODEL.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.max_position_embeddings) == (12, 1024)
    assert sum(parameter.numel() for parameter in MODEL.parameters()) <= MAX_PARAMETERS
    files = {path.name for path in MODEL_DIRECTORY.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert (MODEL_DIRECTORY / "model.safetensors").stat().st_size < MAX_BYTES
    assert (MODEL.config.eos_token_id, MODEL.config.bos_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.bos_token_id)
    assert MODEL.generation_config.eos_token_id == TOKENIZER.eos_token_id


def test_its_chat_template_renders() -> None:
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin|><|user|>Hi!<|end|><|assistant|>"


def test_it_predicts_held_out_text() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIRECTORY / "tokenizer.json"))
    perplexity = held_out_perplexity(MODEL, tokenizer, count=15)
    print(f"perplexity on 15 held-out documents: {perplexity:.3f}, limit {MAX_PERPLEXITY}")
    assert perplexity < MAX_PERPLEXITY


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Why is the sky blue?", "The sky is blue because"),
        ("Who are you?", "I am a small language model."),
        ("Tell me a story about an owl.", "owl"),
    ],
)
def test_its_greedy_answers_are_sentences_that_end(question: str, expected: str) -> None:
    ids = _answer(question)
    assert ids[-1] == TOKENIZER.eos_token_id
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert expected in text
    assert re.fullmatch(r"[A-Z].*[.!?\"]", text), text
    assert _unknown_words(text) == []


def test_a_long_text_stays_english_past_its_end() -> None:
    ids = TOKENIZER("Once upon a time", return_tensors="pt").input_ids
    MODEL.generation_config.eos_token_id, before = None, MODEL.generation_config.eos_token_id
    try:
        output, _ = _greedy(ids, 500)
    finally:
        MODEL.generation_config.eos_token_id = before
    text = TOKENIZER.decode(output, skip_special_tokens=True)
    unknown = _unknown_words(text)
    assert len(text.split()) > 250
    assert len(unknown) <= 5, unknown


def test_its_greedy_choices_are_clear() -> None:
    gaps: list[float] = []
    for prompt in ("Once upon a time", "One cold morning, the fox", "The little bear was", "In the garden there was"):
        gaps += _greedy(TOKENIZER(prompt, return_tensors="pt").input_ids, 150)[1]
    unclear = sum(gap < CLEAR_GAP for gap in gaps)
    print(f"{unclear} of {len(gaps)} gaps are under {CLEAR_GAP}; the median is {sorted(gaps)[len(gaps) // 2]:.2f}")
    assert unclear <= len(gaps) // 50


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text)


@cache
def _corpus_words() -> frozenset[str]:
    return frozenset(word for document in islice(documents(1, held_out=False), 2000) for word in _words(document.text))


def _unknown_words(text: str) -> list[str]:
    return [word for word in _words(text) if word not in _corpus_words()]

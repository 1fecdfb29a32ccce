"""The training run: the same twice, resumable by nobody, and saved as an ordinary directory."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocks.demo_training.train import Recipe, build_tokenizer, save_model, train


def test_the_rate_rises_and_falls_by_steps() -> None:
    recipe = Recipe(steps=1000)
    rates = [recipe.rate(step) for step in range(1000)]
    assert max(rates) == pytest.approx(recipe.peak_rate)
    assert rates.index(max(rates)) in range(recipe.warm_up_steps - 1, recipe.warm_up_steps + 1)
    assert rates[-1] == pytest.approx(recipe.final_rate, rel=0.01)


def test_the_end_of_a_run_sees_sequences_as_long_as_the_context() -> None:
    lengths = [Recipe(steps=100).length_tokens(step) for step in range(100)]
    assert lengths == [256] * 88 + [1024] * 12


def test_a_run_is_reproducible_and_its_directory_loads(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(documents_count=200)
    recipe = Recipe(steps=2, batch_tokens=64, short_tokens=32, long_percent=0)
    for name in ("one", "two"):
        save_model(train(tokenizer, recipe), tokenizer, tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a dict
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))

"""An adapter that PEFT made, used by a whole daemon through its socket: the tokens are PEFT's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from blocks.demo import MODEL_DIRECTORY
from peerd.client import ApiError, Client
from tests.peerd.in_process import daemon

PROMPT = list(range(300, 306))
NEW = 12


def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32).eval()


def make(directory: Path) -> None:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations within peft
        model = get_peft_model(demo(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.mul_(6)  # so that it is heard
        model.save_pretrained(directory)


def tokens(client: Client, **settings: Any) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    choice: list[int] = client.complete("/v1/completions", body | settings)["choices"][0]["token_ids"]
    return choice


def greedy(model: Any) -> list[int]:
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_generating_with_peft_s_adapter_gives_peft_s_tokens(tmp_path: Path) -> None:
    state = tmp_path / "state"
    make(state / "adapters" / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = greedy(PeftModel.from_pretrained(demo(), state / "adapters" / "theirs").eval())
    with daemon(state, "--serve-blocks", "0:12", "--model", "demo") as running:
        client = running.client
        assert tokens(client, adapter="theirs") == expected
        assert tokens(client) == greedy(demo()) != expected
        [adapter] = client.call("GET", "/api/v0/adapters")["adapters"]
        assert (adapter["name"], adapter["length"], adapter["problem"]) == ("theirs", 7, None)
        client.call("DELETE", "/api/v0/adapters/theirs")
        with pytest.raises(ApiError, match="no adapter 'theirs'"):
            tokens(client, adapter="theirs")

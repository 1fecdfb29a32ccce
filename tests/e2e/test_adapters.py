"""Adapters that PEFT made, and that jobs made, used by a whole daemon through its socket: the tokens are PEFT's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from blocks.demo import MODEL_DIRECTORY
from blocks.demo_training import greetings
from peerd.client import ApiError, Client
from peerd.client.jobs import create_job, watch_job
from tests.e2e.processes import wait_until
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


def of_peft(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(demo(), directory).eval()


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
    expected = greedy(of_peft(state / "adapters" / "theirs"))
    with daemon(state, "--serve-blocks", "0:12", "--model", "demo") as running:
        client = running.client
        assert tokens(client, adapter="theirs") == expected
        assert tokens(client) == greedy(demo()) != expected
        [adapter] = client.call("GET", "/api/v0/adapters")["adapters"]
        assert (adapter["name"], adapter["length"], adapter["problem"]) == ("theirs", 7, None)
        client.call("DELETE", "/api/v0/adapters/theirs")
        with pytest.raises(ApiError, match="no adapter 'theirs'"):
            tokens(client, adapter="theirs")


def test_an_adapter_that_a_job_made_gives_the_same_tokens_in_peft(tmp_path: Path) -> None:
    lines = [json.dumps(example) for example in greetings.examples(seed=0, count=24)]
    with daemon(tmp_path / "state", "--serve-blocks", "0:12", "--model", "demo") as running:
        client = running.client
        wait_until(lambda: [model["state"] for model in client.status()["models"]] == ["online"])
        create_job(client, {"name": "ours", "length": 6, "epochs": 1}, "\n".join(lines).encode())
        *_, job = watch_job(client, "ours")
        assert job["state"] == "done"
        assert tokens(client, adapter="ours") == greedy(of_peft(tmp_path / "state" / "adapters" / "ours"))
        assert tokens(client, adapter="ours") != tokens(client)

"""Adapters over the real socket: listed, removed, asked for by name in a completion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from overlay.rpc.types import Part
from peerd.adapters.adapter import ModelShape
from peerd.adapters.store import AdapterStore
from peerd.client import ApiError, Client
from tests.peerd.scripted import MODEL_ID, ScriptedNode, answering

SHAPE = ModelShape("demo", MODEL_ID, "none/bfloat16/sdpa/1", 12, 4, 4, 2, 1024)
PATH = "/api/v0/adapters"


def floats(*shape: int) -> Part:
    return Part("x", "float32", shape, np.ones(shape, np.float32).tobytes())


@pytest.fixture
def node(tmp_path: Path) -> ScriptedNode:
    store = AdapterStore(tmp_path / "adapters")
    store.save_prompt("first", SHAPE, floats(5, 4), {})
    store.save_deep_prompt("second", SHAPE, floats(3, 4), floats(12, 3, 4), {})
    return ScriptedNode(adapters_directory=tmp_path / "adapters", context_tokens=64)


@pytest.fixture
def client(node: ScriptedNode, tmp_path: Path) -> Iterator[Client]:
    with answering(node, tmp_path / "run" / "peerd.sock") as path:
        yield Client(path)


def test_adapters_are_listed(client: Client, node: ScriptedNode) -> None:
    (node.adapters_directory / "broken").mkdir()
    broken, first, second = client.call("GET", PATH)["adapters"]
    assert "adapter_config.json" in broken["problem"]
    assert {name: first[name] for name in ("name", "kind", "model", "model_id", "length", "problem")} == {
        "name": "first", "kind": "prompt", "model": "demo", "model_id": MODEL_ID, "length": 5, "problem": None,
    }  # fmt: skip
    assert (second["kind"], second["length"]) == ("deep-prompt", 3)
    assert client.call("GET", f"{PATH}/second") == second


def test_a_removed_adapter_is_no_longer_there(client: Client) -> None:
    client.call("DELETE", f"{PATH}/first")
    assert [adapter["name"] for adapter in client.call("GET", PATH)["adapters"]] == ["second"]
    for method in ("GET", "DELETE"):
        with pytest.raises(ApiError, match="peerctl adapters") as caught:
            client.call(method, f"{PATH}/first")
        assert (caught.value.http_status, caught.value.code, caught.value.exit_code) == (404, "unknown-adapter", 82)


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2fadapters", "a%00b", "."])
def test_names_are_no_paths(client: Client, node: ScriptedNode, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        client.call("DELETE", f"{PATH}/{name}")
    assert caught.value.http_status in (400, 404, 405)
    assert node.adapters_directory.is_dir()


def test_a_completion_gets_the_adapter_in_front(client: Client, node: ScriptedNode) -> None:
    client.complete("/v1/completions", {"prompt": "One day", "adapter": "first"})
    client.complete("/v1/completions", {"prompt": "One day", "adapter": "second"})
    client.complete("/v1/completions", {"prompt": "One day"})
    first, second, bare = (decode.request for decode in node.decodes)
    assert first.prefix is not None and first.prefix.shape == (5, 4) and first.prompts is None
    assert second.prompts is not None and second.prompts.shape == (12, 3, 4)
    assert (bare.prefix, bare.prompts) == (None, None)
    assert first.prompt == second.prompt == bare.prompt


def test_the_context_is_shorter_by_the_adapter(client: Client, node: ScriptedNode) -> None:
    prompt = [5] * 50
    usage = client.complete("/v1/completions", {"prompt": prompt, "adapter": "first"})["usage"]
    assert usage["prompt_tokens"] == 50
    assert node.decodes[-1].request.max_new_tokens == 64 - 5 - 50
    with pytest.raises(
        ApiError, match="has 60 tokens, and the context of demo is 64, 5 of them the adapter's; shorten"
    ):
        client.complete("/v1/completions", {"prompt": [5] * 60, "adapter": "first"})
    with pytest.raises(ApiError, match="is 64, 5 of them the adapter's; shorten the prompt or ask for at most 9"):
        client.complete("/v1/completions", {"prompt": prompt, "adapter": "first", "max_tokens": 10})


def test_unknown_adapters_and_those_of_other_models_are_refused(client: Client, node: ScriptedNode) -> None:
    with pytest.raises(ApiError, match="no adapter 'third'") as caught:
        client.complete("/v1/completions", {"prompt": "x", "adapter": "third"})
    assert (caught.value.http_status, caught.value.code) == (404, "unknown-adapter")
    node.adapters.save_prompt("other", ModelShape("big", "cd" * 32, "c", 12, 4, 4, 2, 64), floats(2, 4), {})
    with pytest.raises(ApiError, match="made for big") as caught:
        client.complete("/v1/completions", {"prompt": "x", "adapter": "other"})
    assert (caught.value.http_status, caught.value.code) == (400, "wrong-adapter")
    with pytest.raises(ApiError, match="adapter must be a string"):
        client.complete("/v1/completions", {"prompt": "x", "adapter": 5})
    assert node.decodes == []

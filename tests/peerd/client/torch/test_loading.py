"""`from_pretrained` takes what ``--model`` takes, and the names that the network gives; the socket is found as the commands find it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from blocks.demo import MODEL_DIRECTORY
from blocks.model import hub as hub_module
from blocks.model.errors import HubUnavailable, ModelNotFound
from blocks.model.hub import Hub
from peerd.client import ApiError, DaemonNotRunning
from peerd.client.torch import RemoteModelForCausalLM
from tests.blocks.model.hub_stub import COMMIT, HubStub, hub_stub
from tests.e2e.processes import wait_until
from tests.models import make_tiny
from tests.peerd.in_process import LocalDaemon, daemon

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "little")


@pytest.fixture(scope="module")
def node(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDaemon]:
    with daemon(tmp_path_factory.mktemp("state"), "--model", str(tiny), "--model", "demo") as running:
        wait_until(lambda: [model["state"] for model in running.client.status()["models"]] == ["online"] * 2)
        yield running


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, node: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's user; the socket as a user would set it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PEERD_SOCKET", str(node.socket_path))


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with hub_stub(tiny) as stub:
        use_hub(stub.endpoint, tmp_path, monkeypatch)
        yield stub


def use_hub(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME would do before the first import."""
    monkeypatch.setattr(hub_module, "Hub", functools.partial(Hub, endpoint=endpoint, cache_dir=tmp_path / "hub"))


def logits_of(remote: Any) -> torch.Tensor:
    found: torch.Tensor = remote(IDS).logits
    return found


def of_local(directory: Path) -> torch.Tensor:
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits
    return found


def test_the_demo_and_a_directory_are_found_by_their_files(tiny: Path) -> None:
    demo = RemoteModelForCausalLM.from_pretrained("demo")
    assert (demo.name_or_path, len(demo.blocks)) == (str(MODEL_DIRECTORY), 12)
    torch.testing.assert_close(logits_of(demo), of_local(MODEL_DIRECTORY))
    little = RemoteModelForCausalLM.from_pretrained(str(tiny))
    assert little.name_or_path == str(tiny)
    torch.testing.assert_close(logits_of(little), of_local(tiny))


@pytest.mark.parametrize("spec", ["owner/model", f"owner/model@{COMMIT}"])
def test_a_hub_id_is_found_at_the_hub_and_by_its_content_at_the_daemon(hub: HubStub, tiny: Path, spec: str) -> None:
    remote = RemoteModelForCausalLM.from_pretrained(spec)
    assert COMMIT in remote.name_or_path
    assert "model.safetensors" in hub.fetched  # of a model in one file there are no smaller parts
    torch.testing.assert_close(logits_of(remote), of_local(tiny))


def test_the_names_of_the_network_need_no_files(tiny: Path, node: LocalDaemon) -> None:
    identity = node.client.call("GET", "/api/v0/models/little")["id"]
    for name in ("little", f"little@{identity[:12]}", identity):
        torch.testing.assert_close(logits_of(RemoteModelForCausalLM.from_pretrained(name)), of_local(tiny))


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("unheard-of", ModelNotFound, "'unheard-of': give 'demo', a directory"),
        ("./nowhere", ModelNotFound, "is not a directory"),
        ("/etc", ModelNotFound, "no config.json"),
        ("owner/other", ModelNotFound, "hub knows no owner/other"),
    ],
)
def test_what_is_no_model_is_said_in_a_sentence(hub: HubStub, spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RemoteModelForCausalLM.from_pretrained(spec)


def test_a_hub_that_is_away_is_said_where_the_daemon_knows_no_such_model_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub("http://127.0.0.1:1", tmp_path, monkeypatch)
    with pytest.raises(HubUnavailable, match="can't be reached for owner/model") as caught:
        RemoteModelForCausalLM.from_pretrained("owner/model")
    assert isinstance(caught.value.__cause__, ApiError)


def test_a_directory_that_differs_by_a_bit_is_another_model(tmp_path: Path, tiny: Path) -> None:
    other = make_tiny("llama", tmp_path / "little", seed=9)
    with pytest.raises(ApiError) as caught:
        RemoteModelForCausalLM.from_pretrained(str(other))
    assert caught.value.code == "unknown-model"


def test_a_socket_that_is_given_comes_before_the_environment_s(
    node: LocalDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERD_SOCKET", str(tmp_path / "nobody.sock"))
    assert len(RemoteModelForCausalLM.from_pretrained("demo", socket=node.socket_path).blocks) == 12
    with pytest.raises(DaemonNotRunning, match=r"nobody\.sock; is it running"):
        RemoteModelForCausalLM.from_pretrained("demo")

"""A hub id from the command line to the tokens, with real daemons and a hub on loopback that speaks the real one's HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.model.exact import Reference
from peerd.loopback import running, start_daemon
from tests.blocks.model.hub_stub import HubStub, hub_stub
from tests.e2e.processes import Network, greedy, wait_until
from tests.models import make_tiny

PROMPT = [5, 6, 7, 8, 9]
TOKENS = 24

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The hub of every daemon that the test starts; each test has a cache of its own."""
    for variable in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    with hub_stub(make_tiny("llama", tmp_path / "served")) as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield stub


def test_two_daemons_fetch_their_spans_and_give_the_tokens_of_local_transformers(hub: HubStub, tmp_path: Path) -> None:
    made = Network(tmp_path / "network")
    with running(made.daemons):
        made.start("client", "--model", "owner/model", "--serve-blocks", "0:2")
        made.start("second", "--model", "owner/model", "--serve-blocks", "2:4")
        wait_until(lambda: made.replicas("owner/model", 4) == [1] * 4)
        for name in ("client", "second"):
            assert [model["name"] for model in made.client(name).status()["models"]] == ["owner/model"]
        body = {"model": "owner/model", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
        ids, facts = greedy(made.client(), body)
        made.check_logs()
    assert ids == Reference.load(str(hub.directory)).greedy(PROMPT, TOKENS)
    assert [hop["span"] for hop in facts["route"]] == ["0:2", "2:4"]
    assert set(hub.fetched) >= {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("spec", "refusal", "code", "sentence"),
    [
        ("owner/model", "gated", 43, r"peerd: owner/model is gated: .* `hf auth login` .*"),
        ("owner/model", "token", 40, r"peerd: The hub knows no owner/model, or it is private: .* `hf auth login` .*"),
        ("owner/other", "", 40, r"peerd: The hub knows no owner/other, .*"),
    ],
    ids=["403", "401", "404"],
)
def test_what_the_hub_refuses_ends_the_daemon_with_its_sentence(
    hub: HubStub, tmp_path: Path, spec: str, refusal: str, code: int, sentence: str
) -> None:
    hub.gated = refusal == "gated"
    hub.token = "hf_wanted" if refusal == "token" else None
    daemon = start_daemon("daemon", tmp_path, "--model", spec)
    with running([daemon]):
        assert daemon.process.wait(90) == code
    log = daemon.log_path.read_text()
    assert re.fullmatch(sentence, log.splitlines()[-1])
    assert "Traceback" not in log
    assert "HTTP Request" not in log

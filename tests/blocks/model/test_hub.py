"""The hub's path against a stub that speaks its HTTP: what is fetched, what is verified, and each refusal in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from blocks.model import hub as hub_module
from blocks.model.errors import BadModel, DiskFull, HubRefused, HubUnavailable, ModelNotFound
from blocks.model.hub import Hub
from blocks.model.identity import id_of
from blocks.model.limits import HUB_ATTEMPTS, HUB_RETRY_AFTER_S
from blocks.model.source import INDEX_FILE, SINGLE_FILE, resolve
from tests.blocks.model.hub_stub import COMMIT, HubStub, hub_stub
from tests.models import make_tiny

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two shards: blocks 0 and 1 in the first, the rest in the second."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("llama"))
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    place = {name: SHARDS[0] if ".layers.0." in name or ".layers.1." in name else SHARDS[1] for name in tensors}
    for shard in SHARDS:
        save_file({name: tensor for name, tensor in tensors.items() if place[name] == shard}, directory / shard)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return directory


@pytest.fixture
def stub(made: Path, tmp_path: Path) -> Iterator[HubStub]:
    directory = Path(shutil.copytree(made, tmp_path / "served"))
    with hub_stub(directory) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def hub(stub: HubStub, tmp_path: Path, waits: list[float]) -> Hub:
    return Hub(endpoint=stub.endpoint, cache_dir=tmp_path / "cache", sleep=waits.append)


def test_a_model_is_pinned_and_no_weights_are_fetched_to_know_it(hub: Hub, stub: HubStub, made: Path) -> None:
    found = hub.resolve("owner/model@v1")
    assert (found.kind, found.name, found.revision, found.blocks) == ("hub", "owner/model", COMMIT, 4)
    assert not [name for name in stub.fetched if name.endswith(".safetensors")]
    assert id_of(found) == id_of(resolve(str(made)))  # the listing's digests are those of the files
    assert "tokenizer.json" in found.text_files


def test_only_the_shards_that_hold_the_span_are_fetched_and_only_once(hub: Hub, stub: HubStub) -> None:
    found = hub.resolve("owner/model")
    seen: list[tuple[int, int]] = []
    hub.fetch(found, found.tensors_of_span(0, 2), lambda done, total: seen.append((done, total)))
    assert [name for name in stub.fetched if name.endswith(".safetensors")] == [SHARDS[0]]
    size = found.weights[0].size
    assert seen[-1] == (size, size)
    hub.fetch(found, found.tensors_of_span(1, 3))
    hub.fetch(found, found.tensors_of_span(0, 4))
    assert [name for name in stub.fetched if name.endswith(".safetensors")] == list(SHARDS)


def test_a_single_file_model_is_known_by_its_header_alone(hub: Hub, stub: HubStub) -> None:
    make_tiny("qwen2", stub.directory)  # saving it removes the shards that were there
    (stub.directory / INDEX_FILE).unlink(missing_ok=True)
    found = hub.resolve("owner/model")
    assert [file.name for file in found.weights] == [SINGLE_FILE]
    assert len(found.tensors_of_span(0, 4)) == 4 * 12
    assert SINGLE_FILE not in stub.fetched


def test_a_shard_that_isn_t_what_was_listed_is_removed(hub: Hub, stub: HubStub) -> None:
    found = hub.resolve("owner/model")
    stub.corrupt.add(SHARDS[1])
    with pytest.raises(BadModel, match="damaged and was removed"):
        hub.fetch(found, found.tensors_of_span(2, 3))
    stub.corrupt.clear()
    hub.fetch(found, found.tensors_of_span(2, 3))
    assert (found.directory / SHARDS[1]).is_file()


def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(hub: Hub, stub: HubStub, waits: list[float]) -> None:
    stub.faults["info"] = [429, 503]
    assert hub.resolve("owner/model").revision == COMMIT
    assert waits == [7.0, 7.0]


def test_a_hub_that_stays_busy_is_given_up_in_words(hub: Hub, stub: HubStub, waits: list[float]) -> None:
    stub.faults["info"] = [429] * 50
    with pytest.raises(HubUnavailable, match="limits how often") as caught:
        hub.resolve("owner/model")
    assert caught.value.retryable
    assert len(waits) == HUB_ATTEMPTS - 1
    assert max(waits) <= HUB_RETRY_AFTER_S


def test_an_unknown_model_is_said_to_be_unknown_or_private(hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match="knows no owner/nothing"):
        hub.resolve("owner/nothing")


def test_an_unknown_revision_is_told_from_an_unknown_model(hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match="no such revision"):
        hub.resolve("owner/model@v9")


def test_a_private_model_opens_with_its_token(stub: HubStub, tmp_path: Path) -> None:
    stub.token = "hf_secret"
    with pytest.raises(ModelNotFound, match="HF_TOKEN"):
        Hub(endpoint=stub.endpoint, cache_dir=tmp_path / "a", token="hf_wrong").resolve("owner/model")
    found = Hub(endpoint=stub.endpoint, cache_dir=tmp_path / "b", token="hf_secret").resolve("owner/model")
    assert found.blocks == 4


def test_a_gated_model_tells_how_to_get_in(hub: Hub, stub: HubStub) -> None:
    stub.gated = True
    with pytest.raises(HubRefused, match="accept its terms"):
        hub.resolve("owner/model")


def test_a_listed_file_that_is_gone_is_said_so(hub: Hub, stub: HubStub) -> None:
    found = hub.resolve("owner/model")
    (stub.directory / SHARDS[0]).unlink()
    with pytest.raises(ModelNotFound, match="lacks a file"):
        hub.fetch(found, found.tensors_of_span(0, 1))


def test_a_hub_that_fails_or_isn_t_there_is_unavailable(hub: Hub, stub: HubStub, tmp_path: Path) -> None:
    stub.faults["info"] = [500]
    with pytest.raises(HubUnavailable, match="answered 500"):
        hub.resolve("owner/model")
    nobody = Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "n")
    with pytest.raises(HubUnavailable, match="can't be reached"):
        nobody.resolve("owner/model")


def test_pickled_weights_are_refused_without_fetching_them(hub: Hub, stub: HubStub) -> None:
    for name in (*SHARDS, INDEX_FILE):
        (stub.directory / name).unlink()
    (stub.directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadModel, match="can run code"):
        hub.resolve("owner/model")
    assert "pytorch_model.bin" not in stub.fetched


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.resolve("owner/model")
    usage = shutil.disk_usage(stub.directory)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="set HF_HOME to another disk"):
        hub.fetch(found, found.tensors_of_span(0, 1))
    assert SHARDS[0] not in stub.fetched


@pytest.mark.parametrize("spec", ["owner/mo del", "owner/--x..y", "owner/" + "n" * 200])
def test_what_can_t_be_a_hub_id_is_not_asked_for(hub: Hub, stub: HubStub, spec: str) -> None:
    with pytest.raises(ModelNotFound, match="no hub id"):
        hub.resolve(spec)
    assert stub.requests == []


def test_the_environment_names_the_hub_and_torch_stays_unloaded(stub: HubStub, tmp_path: Path) -> None:
    script = (
        "import sys; from blocks.model.source import resolve; found = resolve('owner/model');"
        "sys.exit(f'{[m for m in (\"torch\", \"transformers\") if m in sys.modules]}' if 'torch' in sys.modules"
        " else 0 if found.blocks == 4 else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False, capture_output=True, text=True, timeout=60,
        env={"HF_ENDPOINT": stub.endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "hub" / "models--owner--model").is_dir()

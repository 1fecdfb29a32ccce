"""Adapters on disk: PEFT's own directories load here, ours load in PEFT, and nothing else does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from overlay.rpc.types import Part
from peerd.adapters.adapter import DEEP_PROMPT, PROMPT, ModelShape, require_fit, shape_of
from peerd.adapters.errors import AdapterExists, AdapterNotSaved, BadAdapter, UnknownAdapter, WrongAdapter
from peerd.adapters.store import AdapterStore
from peerd.driving import DriverModel
from routing.types import ComputeClass, ModelId
from tests.models import make_tiny

LENGTH, WIDTH, BLOCKS = 5, 32, 4
SHAPE = ModelShape("tiny", "ab" * 32, "none/float32/sdpa/1", BLOCKS, WIDTH, WIDTH, 4, 128)
IDS = torch.tensor([[40, 41, 42, 43]])


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def floats(*shape: int, seed: int = 0) -> Part:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return Part("x", "float32", shape, values.tobytes())


def made_by_peft(directory: Path, into: Path, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations within peft
        model = get_peft_model(base(directory), config)
        model.save_pretrained(into)
    return model.eval()


def of_peft(directory: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(base(directory), adapter).eval()


def numbers(part: Part | None) -> Any:
    assert part is not None
    return np.frombuffer(part.data, np.float32).reshape(part.shape)


def test_a_prompt_made_by_peft_loads_here(model_directory: Path, store: AdapterStore, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    model = made_by_peft(model_directory, tmp_path / "adapters" / "theirs", config)
    adapter = store.load("theirs")
    assert (adapter.kind, adapter.length, adapter.model_id, adapter.prompts) == (PROMPT, LENGTH, "", None)
    expected = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    assert np.array_equal(numbers(adapter.prefix), expected)
    require_fit(adapter, SHAPE)


def test_a_prompt_made_here_loads_in_peft_without_a_word_and_gives_the_same_logits(
    model_directory: Path, store: AdapterStore, tmp_path: Path
) -> None:
    prefix = floats(LENGTH, WIDTH)
    store.save_prompt("ours", SHAPE, prefix, {"steps": 3})
    model = of_peft(model_directory, tmp_path / "adapters" / "ours")
    plain = base(model_directory)
    rows = torch.tensor(numbers(prefix))[None]
    with torch.no_grad():
        embedded = torch.cat([rows, plain.get_input_embeddings()(IDS)], dim=1)
        assert torch.equal(model(input_ids=IDS).logits, plain(inputs_embeds=embedded).logits)


def test_what_is_kept_comes_back_with_where_it_came_from(store: AdapterStore) -> None:
    prefix, prompts = floats(LENGTH, WIDTH), floats(BLOCKS, LENGTH, WIDTH, seed=1)
    store.save_prompt("one", SHAPE, prefix, {"loss": 1.5})
    store.save_deep_prompt("two", SHAPE, prefix, prompts, {})
    store.save_deep_prompt("three", SHAPE, None, prompts, {})
    one, two, three = (store.load(name) for name in ("one", "two", "three"))
    assert (one.kind, two.kind, three.kind) == (PROMPT, DEEP_PROMPT, DEEP_PROMPT)
    assert (one.length, two.length, three.length) == (LENGTH, LENGTH, 0)
    assert (one.model_id, one.model_name) == (SHAPE.model_id, "tiny")
    assert np.array_equal(numbers(two.prefix), numbers(prefix))
    assert np.array_equal(numbers(three.prompts), numbers(prompts))
    infos = store.list()
    assert [(info.name, info.kind, info.length, info.problem) for info in infos] == [
        ("one", PROMPT, LENGTH, ""), ("three", DEEP_PROMPT, LENGTH, ""), ("two", DEEP_PROMPT, LENGTH, ""),
    ]  # fmt: skip
    assert infos[0].size_bytes > LENGTH * WIDTH * 4
    for adapter in (one, two, three):
        require_fit(adapter, SHAPE)


def test_peft_refuses_our_deep_prompts_rather_than_misread_them(
    model_directory: Path, store: AdapterStore, tmp_path: Path
) -> None:
    store.save_deep_prompt("deep", SHAPE, None, floats(BLOCKS, LENGTH, WIDTH), {})
    with pytest.raises((ValueError, KeyError)):
        of_peft(model_directory, tmp_path / "adapters" / "deep")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
            "PREFIX_TUNING, which is keys and values",
        ),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "LORA, which is changes to the weights"),
    ],
)
def test_peft_s_other_types_are_refused_in_words(
    model_directory: Path, store: AdapterStore, tmp_path: Path, config: Any, words: str
) -> None:
    made_by_peft(model_directory, tmp_path / "adapters" / "other", config)
    with pytest.raises(BadAdapter, match=words):
        store.load("other")
    [info] = store.list()
    assert words in info.problem


def kept(store: AdapterStore, tmp_path: Path) -> Path:
    store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH), {})
    return tmp_path / "adapters" / "one"


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        (CONFIG, None, f"no {CONFIG}"),
        (CONFIG, b"{", "not JSON"),
        (CONFIG, b"[" * 100_000, "not JSON"),
        (CONFIG, b"[]", "not an object"),
        (CONFIG, b"{}", "of the type None"),
        (CONFIG, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (CONFIG, {"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        (CONFIG, {"num_transformer_submodules": 2}, "encoder"),
        (CONFIG, {"num_virtual_tokens": 6}, r"\(5, 32\), and should have \(6"),
        (CONFIG, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        (CONFIG, {"num_virtual_tokens": "5"}, "num_virtual_tokens"),
        (CONFIG, {"num_virtual_tokens": 5000}, "4096"),
        (CONFIG, {"peft_type": "PEERD_DEEP_PROMPT"}, "no tensor deep_prompts"),
        (TENSORS, None, f"no {TENSORS}"),
        (TENSORS, b"\x80\x04 a pickle", "can't be read"),
        (TENSORS, {"prompt_embeddings": torch.zeros(LENGTH, WIDTH), "more": torch.zeros(1)}, "'more'"),
        (TENSORS, {"other": torch.zeros(LENGTH, WIDTH)}, "'other'"),
        (TENSORS, {"prompt_embeddings": torch.zeros(LENGTH)}, "shape"),
        (TENSORS, {"prompt_embeddings": torch.zeros(LENGTH, 0)}, "shape"),
        (TENSORS, {"prompt_embeddings": torch.zeros(LENGTH, WIDTH, dtype=torch.int64)}, "I64"),
        (TENSORS, {"prompt_embeddings": torch.full((LENGTH, WIDTH), torch.nan)}, "not a number"),
        (TENSORS, {"prompt_embeddings": torch.full((LENGTH, WIDTH), torch.inf, dtype=torch.bfloat16)}, "infinite"),
        ("peerd.json", b"no", "not JSON"),
    ],
)
def test_what_is_no_adapter_is_refused_in_a_sentence(
    store: AdapterStore, tmp_path: Path, file: str, data: Any, words: str
) -> None:
    path = kept(store, tmp_path) / file
    if data is None:
        path.unlink()
    elif isinstance(data, bytes):
        path.write_bytes(data)
    elif file == TENSORS:
        save_file(data, path)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | data))
    with pytest.raises(BadAdapter, match=words):
        store.load("one")


def test_a_pickle_is_refused_by_its_name(store: AdapterStore, tmp_path: Path) -> None:
    directory = kept(store, tmp_path)
    (directory / TENSORS).rename(directory / "adapter_model.bin")
    with pytest.raises(BadAdapter, match="could run code"):
        store.load("one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_id": "cd" * 32, "name": "other"}, "made for tiny"),
        ({"blocks": 6}, "blocks are 4, not 6"),
        ({"heads": 8}, "heads are 4, not 8"),
        ({"embedding_width": 16}, "rows are of 32, not 16"),
        ({"width": 16}, "deep prompts are of 32, not 16"),
        ({"context_tokens": 5}, "takes 5 positions"),
    ],
)
def test_an_adapter_for_another_model_is_refused(store: AdapterStore, change: dict[str, Any], words: str) -> None:
    store.save_deep_prompt("one", SHAPE, floats(LENGTH, WIDTH), floats(BLOCKS, LENGTH, WIDTH), {})
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__slots__} | change
    with pytest.raises(WrongAdapter, match=words):
        require_fit(store.load("one"), ModelShape(**fields))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", ".hidden", "-a", "a" * 65, "a b", "ä", "a\n"])
def test_names_that_could_be_paths_are_refused(store: AdapterStore, name: str) -> None:
    with pytest.raises(BadAdapter, match="name of an adapter"):
        store.save_prompt(name, SHAPE, floats(LENGTH, WIDTH), {})
    for asked in (store.load, store.remove, store.info):
        with pytest.raises(UnknownAdapter):
            asked(name)


def test_a_name_is_taken_once_and_replaced_only_on_purpose(store: AdapterStore) -> None:
    store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH), {})
    with pytest.raises(AdapterExists, match="peerctl adapters remove one"):
        store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH, seed=1), {})
    store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH, seed=2), {}, replace=True)
    assert np.array_equal(numbers(store.load("one").prefix), numbers(floats(LENGTH, WIDTH, seed=2)))
    assert [info.name for info in store.list()] == ["one"]


def test_an_adapter_that_can_t_be_written_leaves_the_former_one(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH), {})

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peerd.adapters.store.write_synced", full)
    with pytest.raises(AdapterNotSaved, match="No space left"):
        store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH, seed=1), {}, replace=True)
    assert np.array_equal(numbers(store.load("one").prefix), numbers(floats(LENGTH, WIDTH)))


def test_a_replacement_cut_off_between_its_renames_gives_the_former_adapter_back(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(store, tmp_path)
    rename = Path.rename

    class Killed(BaseException):
        """As SIGKILL: nothing of the store runs afterwards."""

    def dies_before_the_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies_before_the_second)
        with pytest.raises(Killed):
            store.save_prompt("one", SHAPE, floats(LENGTH, WIDTH, seed=1), {}, replace=True)
    assert store.list() == ()
    restarted = AdapterStore(tmp_path / "adapters")
    restarted.recover()
    assert np.array_equal(numbers(restarted.load("one").prefix), numbers(floats(LENGTH, WIDTH)))
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["one"]


@pytest.mark.parametrize("left", [".one.new", ".one.old", ".two.new", ".two.gone"])
def test_what_else_a_crash_left_is_cleared_away(store: AdapterStore, tmp_path: Path, left: str) -> None:
    kept(store, tmp_path)
    aside = tmp_path / "adapters" / left
    shutil.copytree(tmp_path / "adapters" / "one", aside)
    store.recover()
    assert [info.name for info in store.list()] == ["one"]
    assert not aside.exists()


def test_recovery_leaves_alone_what_is_not_the_store_s(store: AdapterStore, tmp_path: Path) -> None:
    store.recover()  # nothing there yet
    kept(store, tmp_path)
    (tmp_path / "adapters" / ".mine").mkdir()
    shutil.copytree(tmp_path / "adapters" / "one", tmp_path / "adapters" / "two.old")  # a name like any other
    store.recover()
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [".mine", "one", "two.old"]


def test_a_directory_that_can_t_be_opened_is_listed_with_its_problem(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(store, tmp_path)

    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    listed = list((tmp_path / "adapters").iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed) if path.name == "adapters" else refused(path))
    [info] = store.list()
    assert (info.name, info.problem) == ("one", "The adapter one can't be read (Permission denied).")


def test_values_that_are_no_numbers_are_not_kept(store: AdapterStore) -> None:
    broken = Part("x", "float32", (1, 2), np.array([1, np.nan], np.float32).tobytes())
    with pytest.raises(BadAdapter, match="not a number"):
        store.save_prompt("one", SHAPE, broken, {})
    assert store.list() == ()


def test_a_removed_adapter_is_gone(store: AdapterStore, tmp_path: Path) -> None:
    kept(store, tmp_path)
    store.remove("one")
    assert (store.list(), store.has("one")) == ((), False)
    assert list((tmp_path / "adapters").iterdir()) == []
    with pytest.raises(UnknownAdapter, match="peerctl adapters"):
        store.remove("one")


def test_a_directory_that_was_copied_in_is_an_adapter(store: AdapterStore, tmp_path: Path) -> None:
    shutil.copytree(kept(store, tmp_path), tmp_path / "adapters" / "copy.2")
    assert store.load("copy.2").length == LENGTH


def test_the_shape_of_a_model_is_read_from_its_config() -> None:
    driver = DriverModel("key", ModelId(bytes(32)), ComputeClass("none", "float32"), 64, 128)
    opt = json.dumps({"word_embed_proj_dim": 32, "num_attention_heads": 4})
    shape = shape_of("opt", 4, opt, driver)
    assert (shape.width, shape.embedding_width, shape.heads, shape.context_tokens) == (64, 32, 4, 128)
    nested = json.dumps({"text_config": {"n_head": 2}})
    assert (shape_of("x", 4, nested, driver).heads, shape_of("x", 4, nested, driver).embedding_width) == (2, 64)

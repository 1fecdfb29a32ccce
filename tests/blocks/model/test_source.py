"""Finding a model's files, and the sentence for each way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blocks.model import source as source_module
from blocks.model.errors import BadModel, ModelNotFound, UnsupportedModel
from blocks.model.identity import id_of
from blocks.model.safetensors_header import block_of, block_prefix, read_header
from blocks.model.source import resolve
from blocks.model.span import load_span
from tests.models import make_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def test_the_demo_is_always_there() -> None:
    found = resolve("demo")
    assert (found.kind, found.name, found.blocks) == ("demo", "demo", 12)
    assert "tokenizer.json" in found.text_files


def test_tensors_divide_into_spans_and_the_rest(directory: Path) -> None:
    found = resolve(str(directory))
    inside = found.tensors_of_span(0, 4)
    assert found.block_prefix == "model.layers"
    assert sorted([*inside, *found.tensors_outside_blocks()]) == sorted(found.tensors)
    assert sorted([*found.tensors_of_span(0, 1), *found.tensors_of_span(1, 4)]) == sorted(inside)
    assert set(found.tensors_outside_blocks()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_experts_and_block_ten_are_told_apart() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(11) for j in range(3)]
    assert block_prefix(names, 11) == "model.layers"
    assert block_of("model.layers.10.mlp.experts.2.w", "model.layers") == 10
    assert block_of("model.layers_norm.1.w", "model.layers") is None
    assert block_prefix(names, 12) is None


@pytest.mark.parametrize("spec", ["/no/such/place", "./nor/here", ""])
def test_a_directory_that_is_not_there_is_named(spec: str) -> None:
    with pytest.raises(ModelNotFound, match="is not a directory"):
        resolve(spec)


def test_a_name_that_is_neither_path_nor_hub_id_lists_what_would_do() -> None:
    with pytest.raises(ModelNotFound, match="owner/name"):
        resolve("lama")


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(BadModel, match="JSON"):
        resolve(str(directory))


def test_weights_only_as_pickle_are_refused_with_the_reason(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(BadModel, match="can run code"):
        resolve(str(directory))


def test_no_weights_at_all_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadModel, match="holds no weights"):
        resolve(str(directory))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -5000])
def test_a_truncated_file_is_named(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadModel, match=r"model\.safetensors is damaged"):
        resolve(str(directory))


def test_a_file_with_a_lying_header_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [31]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(BadModel, match="doesn't add up"):
        resolve(str(directory))


def test_every_header_of_random_bytes_is_refused_and_nothing_else_is_raised(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    for size in (1, 9, 64, 500):
        data = bytes(torch.randint(0, 256, (size,), generator=generator).tolist())
        path = tmp_path / f"{size}.safetensors"
        for prefix in (b"", (size // 2).to_bytes(8, "little")):
            path.write_bytes(prefix + data)
            with pytest.raises(BadModel):
                read_header(path)


def test_weights_that_lack_a_tensor_are_refused_by_name(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BadModel, match=r"layers\.2\.mlp\.up_proj\.weight"):
        load_span(resolve(str(directory)), 2, 3)


def test_weights_of_another_shape_are_refused(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BadModel, match="don't fit the config"):
        load_span(resolve(str(directory)), 2, 3)


def shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_sharded_model_computes_what_the_whole_file_does(made: Path, directory: Path) -> None:
    shard(directory)
    ours, theirs = (load_span(resolve(str(place)), 1, 3, prepare_steps=False) for place in (directory, made))
    hidden = torch.randn(1, 5, 32)
    caches = [span.new_cache(8) for span in (ours, theirs)]
    assert torch.equal(ours.forward(hidden, 0, caches[0]), theirs.forward(hidden, 0, caches[1]))


def test_an_index_that_names_a_missing_shard_or_a_path_is_refused(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadModel, match="lacks model-00002"):
        resolve(str(directory))
    index = {"weight_map": {"a": "../../etc/x.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadModel, match="no safetensors file beside it"):
        resolve(str(directory))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nobody_knows"}, "unknown to the installed transformers"),
        ({"model_type": "nobody_knows", "auto_map": {}}, "own code is never run"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {"a": 1}}, "vision or audio"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ({"model_type": "vit"}, "no causal language model"),
    ],
)
def test_what_can_t_be_served_is_refused_in_words(directory: Path, changes: dict[str, object], reason: str) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedModel, match=reason):
        load_span(resolve(str(directory)), 0, 1)


def test_a_config_of_the_wrong_types_is_refused(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "many"}))
    with pytest.raises(BadModel, match="doesn't fit its type"):
        load_span(resolve(str(directory)), 0, 1)


def test_a_directory_is_hashed_once(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    honest = source_module.sha256_of
    monkeypatch.setattr(source_module, "sha256_of", lambda path, counted: hashed.append(path) or honest(path, counted))
    first = resolve(str(directory), tmp_path / "cache")
    assert resolve(str(directory), tmp_path / "cache") == first
    assert len(hashed) == 1
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, directory / "model.safetensors")
    assert id_of(resolve(str(directory), tmp_path / "cache")) != id_of(first)
    assert len(hashed) == 2


def test_a_damaged_digest_cache_is_worked_out_again(directory: Path, tmp_path: Path) -> None:
    (tmp_path / source_module.DIGEST_CACHE).write_text("{")
    assert resolve(str(directory), tmp_path).weights == resolve(str(directory)).weights

"""Where a model's files are: ``demo``, a directory, or a hub id, resolved to one value that everything else reads.

Owns the reading of configs, the listing of safetensors files with their digests, and which tensor lies in which file. Torch-free.
Must not know how tensors become modules; the hub's HTTP side is `blocks.model.hub`. DESIGN 7, "Model id".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.model.errors import BadModel, ModelNotFound, UnsupportedModel
from blocks.model.limits import HASH_CHUNK_BYTES, MAX_BLOCKS, MAX_CONFIG_BYTES, MAX_INDEX_BYTES, MAX_SHARDS
from blocks.model.safetensors_header import block_of, block_prefix, read_header
from blocks.text import TEXT_FILES

DEMO = "demo"
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGEST_CACHE = "weight-digests.json"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file of a model."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model whose files have been found.

    ``tensors`` maps each tensor to its file. ``directory`` holds the config and text files, and of the weights what is there:
    all of them but for a hub model, whose shards `blocks.model.hub.fetch` brings as they are needed.
    """

    kind: str  # demo, directory or hub
    name: str
    directory: Path
    config: Mapping[str, Any]
    weights: tuple[WeightFile, ...]
    tensors: Mapping[str, str]
    revision: str | None = None

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return block_count(self.config)

    @property
    def text_files(self) -> tuple[str, ...]:
        """The tokenizer and template files that are there."""
        return tuple(name for name in TEXT_FILES if name != CONFIG_FILE and (self.directory / name).is_file())

    @property
    def block_prefix(self) -> str:
        """What precedes a block's index in the tensors' names."""
        prefix = block_prefix(self.tensors, self.blocks)
        if prefix is None:
            raise _lacks_blocks(self.name, self.blocks)
        return prefix

    def tensors_of_span(self, start: int, end: int) -> tuple[str, ...]:
        """Names of the tensors of blocks [start, end)."""
        prefix = self.block_prefix
        return tuple(
            sorted(n for n in self.tensors if (block := block_of(n, prefix)) is not None and start <= block < end)
        )

    def tensors_outside_blocks(self) -> tuple[str, ...]:
        """Names of the tensors that a driver needs: embeddings, final norm, head."""
        prefix = self.block_prefix
        return tuple(sorted(name for name in self.tensors if block_of(name, prefix) is None))

    def files_of(self, tensors: tuple[str, ...]) -> tuple[WeightFile, ...]:
        """The files that hold ``tensors``."""
        wanted = {self.tensors[name] for name in tensors}
        return tuple(file for file in self.weights if file.name in wanted)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder (composite models nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def block_count(config: Mapping[str, Any]) -> int:
    """The number of blocks that a config declares, under whichever of its customary names."""
    fields = text_config(config)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        count = fields.get(name)
        if type(count) is int and 0 < count <= MAX_BLOCKS:
            return count
    raise UnsupportedModel("the model's config.json doesn't say how many blocks it has (num_hidden_layers).")


def resolve(spec: str, cache_dir: Path | None = None, progress: Progress | None = None) -> ModelSource:
    """Find the model that ``spec`` (``demo``, a directory or ``owner/name[@revision]``) names.

    A directory is hashed once; its digests are kept in ``cache_dir``. A hub id is pinned to a commit and only its small files are
    fetched. Blocks on disk and, for the hub, on the network.

    Raises:
        ModelNotFound, BadModel, UnsupportedModel, HubRefused, HubUnavailable.
    """
    directory = local_directory(spec)
    if directory is not None:
        return resolve_directory(directory, cache_dir, progress, kind=DEMO if spec == DEMO else "directory")
    from blocks.model.hub import resolve_hub

    return resolve_hub(spec)


def local_directory(spec: str) -> Path | None:
    """The directory that ``spec`` names; None for what only the hub can tell. Raises ModelNotFound for what is neither."""
    if spec == DEMO:
        return Path(__file__).parent.parent / DEMO
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return path
    looks_like_path = spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if path.exists() or looks_like_path or not spec:
        raise ModelNotFound(f"{spec or '(empty)'} is not a directory: give a model's directory, a hub id or 'demo'.")
    if "/" not in spec.partition("@")[0]:
        raise ModelNotFound(
            f"No model is called {spec!r}: give 'demo', a directory with config.json and safetensors, or owner/name."
        )
    return None


def look_at(spec: str) -> int | None:
    """How many blocks a model on this disk has, once its config and every header of its weights have been found sound.

    Reads no weights, so that a wrong ``--model`` is told at once. None for a hub id, which only the network can tell about.

    Raises:
        ModelNotFound, BadModel, UnsupportedModel: as `resolve` would.
    """
    directory = local_directory(spec)
    if directory is None:
        return None
    blocks = block_count(read_config(directory))
    _, tensors = _weights_of(directory)
    if block_prefix(tensors, blocks) is None:
        raise _lacks_blocks(directory.name, blocks)
    return blocks


def resolve_directory(
    path: Path, cache_dir: Path | None = None, progress: Progress | None = None, kind: str = "directory"
) -> ModelSource:
    """Read a Hugging Face directory."""
    directory = path.resolve()
    config = read_config(directory)
    files, tensors = _weights_of(directory)
    digests = _digests(directory, files, cache_dir, progress)
    weights = tuple(WeightFile(name, (directory / name).stat().st_size, digests[name]) for name in files)
    name = DEMO if kind == DEMO else directory.name
    return ModelSource(kind, name, directory, config, weights, tensors)


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFound(f"{directory} has no {CONFIG_FILE}: it is not a model directory.")
    return read_json(path, MAX_CONFIG_BYTES)


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit_bytes``."""
    try:
        if path.stat().st_size > limit_bytes:
            raise BadModel(f"{path} is larger than {limit_bytes} bytes, which no such file needs.")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(f"{path} can't be read ({error.strerror}): check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path} is not valid JSON: fetch it again.") from error
    if not isinstance(document, dict):
        raise BadModel(f"{path} does not hold a JSON object: fetch it again.")
    return document


def files_by_tensor(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """The checked ``weight_map`` of an index file: tensor name to file name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModel(f"{where} has no weight_map: fetch it again.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise BadModel(f"{where} names {str(file)[:80]!r}, which is no safetensors file beside it.")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise BadModel(f"{where} names more than {MAX_SHARDS} files.")
    return weight_map


def _weights_of(directory: Path) -> tuple[list[str], dict[str, str]]:
    """File names (sorted) and the file of each tensor, every header read."""
    if (directory / INDEX_FILE).is_file():
        index = read_json(directory / INDEX_FILE, MAX_INDEX_BYTES)
        listed = files_by_tensor(index, str(directory / INDEX_FILE))
        names = sorted(set(listed.values()))
    elif (directory / SINGLE_FILE).is_file():
        names, listed = [SINGLE_FILE], {}
    else:
        raise no_safetensors(str(directory), [entry.name for entry in directory.iterdir()])
    tensors: dict[str, str] = {}
    for name in names:
        if not (directory / name).is_file():
            raise BadModel(f"{directory} lacks {name}, which its index names: fetch it again.")
        tensors.update(dict.fromkeys(read_header(directory / name), name))
    missing = next((name for name, file in listed.items() if tensors.get(name) != file), None)
    if missing is not None:
        raise BadModel(f"{directory / listed[missing]} lacks the tensor {missing}, which the index promises.")
    return names, tensors


def _lacks_blocks(name: str, blocks: int) -> BadModel:
    return BadModel(f"{name} lacks the tensors of some of its {blocks} blocks: fetch its files again.")


def no_safetensors(where: str, names: list[str]) -> BadModel:
    """The sentence for a model without safetensors weights."""
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return BadModel(
            f"{where} has its weights only as pickle files (.bin), which can run code when they are opened: "
            "convert them to safetensors first."
        )
    return BadModel(f"{where} has no {SINGLE_FILE}: it holds no weights that can be served.")


def sha256_of(path: Path, counted: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            if counted:
                counted(len(chunk))
    return digest.hexdigest()


def _digests(directory: Path, names: list[str], cache_dir: Path | None, progress: Progress | None) -> dict[str, str]:
    """SHA-256 of each file, from the cache where path, size, time and inode are as they were."""
    known = _load_digests(cache_dir)
    keys = {name: _file_key(directory / name) for name in names}
    todo = [name for name in names if keys[name] not in known]
    total = sum((directory / name).stat().st_size for name in todo)
    done = 0

    def counted(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for name in todo:
        known[keys[name]] = sha256_of(directory / name, counted)
    if todo and cache_dir is not None:
        _save_digests(cache_dir, known)
    return {name: known[keys[name]] for name in names}


def _file_key(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def _load_digests(cache_dir: Path | None) -> dict[str, str]:
    if cache_dir is None or not (cache_dir / DIGEST_CACHE).is_file():
        return {}
    try:
        document = read_json(cache_dir / DIGEST_CACHE, MAX_INDEX_BYTES)
    except BadModel:  # a cache: what can't be read is worked out again
        return {}
    return {key: value for key, value in document.items() if isinstance(value, str) and len(value) == 64}


def _save_digests(cache_dir: Path, digests: dict[str, str]) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = cache_dir / f"{DIGEST_CACHE}.{os.getpid()}"
    temporary.write_text(json.dumps(digests), encoding="utf-8")
    temporary.replace(cache_dir / DIGEST_CACHE)

"""From a model's name to its `transformers` class without blocks: config, embeddings, norm and head, and what the daemon says of it.

Owns where the weights outside the blocks come from: the model's files where they are here or at the hub, else the daemon, which has them
from a server and has checked them. The one file of the client library that reads the environment, since nobody else is there to.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from transformers import GenerationConfig

from blocks.model.architecture import Anatomy, build, parse_dtype, read_config
from blocks.model.errors import HubRefused, HubUnavailable, ModelNotFound
from blocks.model.hub import fetch
from blocks.model.identity import id_of
from blocks.model.source import ModelSource, resolve
from blocks.model.weights import open_tensors
from peerd.client.client import Client
from peerd.client.errors import ApiError, BadAnswer
from peerd.client.locate import socket_path
from peerd.client.tensor_body import Tensor
from peerd.client.torch.blocks import install
from peerd.client.torch.calls import ServedModel, as_torch

DEFAULT_WAIT_S = 60.0
POLL_S = 0.25
OUTSIDE_BYTES_MAX = 8 << 30
UNREADABLE = "The daemon's word on the model can't be read; is the daemon of another version?"
GENERATION_FILE = "generation_config.json"


def load(spec: str, socket: str | os.PathLike[str] | None, wait_s: float) -> tuple[Anatomy, ServedModel]:
    """The model with stand-ins for its blocks, and its side of the daemon.

    Raises:
        PeerdError: the files are here and can't be used. ClientError: the daemon can't be reached, or doesn't know the model.
    """
    client = Client(socket_path(os.environ, socket=None if socket is None else os.fspath(socket)))
    source, missing = _find(spec)
    try:
        served = _served_model(client, spec if source is None else id_of(source).hex(), wait_s)
    except ApiError as error:
        raise missing or error from error
    if source is None:
        return _from_daemon(served), served
    names = source.tensors_outside_blocks()
    fetch(source, names)
    with open_tensors(source, names) as tensors:
        anatomy = build(read_config(source.config), tensors, served.dtype, install)
    anatomy.model.name_or_path = str(source.directory)
    if (source.directory / GENERATION_FILE).is_file():
        anatomy.model.generation_config = GenerationConfig.from_pretrained(str(source.directory))
    return anatomy, served


def _find(spec: str) -> tuple[ModelSource | None, Exception | None]:
    """The model's files; or none, and why."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    try:
        return resolve(spec, base / "peerd"), None
    except (ModelNotFound, HubUnavailable, HubRefused) as error:
        return None, error


def _served_model(client: Client, name: str, wait_s: float) -> ServedModel:
    """What the daemon knows of a model; waits while it still joins its network or loads."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            told = client.call("GET", f"/api/v0/models/{quote(name, safe='')}")
            break
        except ApiError as error:
            if error.code != "model-pending" or time.monotonic() >= deadline:
                raise
        time.sleep(POLL_S)
    identity, known_as, blocks, context = (told.get(field) for field in ("id", "name", "blocks", "max_positions"))
    if not (
        isinstance(identity, str) and isinstance(known_as, str) and isinstance(blocks, int) and isinstance(context, int)
    ):
        raise BadAnswer(UNREADABLE)
    return ServedModel(client, identity, known_as, blocks, context, parse_dtype(str(told.get("dtype"))), wait_s)


def _from_daemon(served: ServedModel) -> Anatomy:
    path = f"/api/v0/models/{served.identity}"
    told = served.client.call("GET", path)
    fields: Any = told.get("config")
    if not isinstance(fields, dict):
        raise BadAnswer(UNREADABLE)
    received, _ = served.client.tensors(f"{path}/tensors", {}, {}, OUTSIDE_BYTES_MAX)
    anatomy = build(read_config(fields), _tensors(received), served.dtype, install)
    anatomy.model.name_or_path = served.name
    return anatomy


def _tensors(received: dict[str, Tensor]) -> dict[str, torch.Tensor]:
    return {name: as_torch(tensor) for name, tensor in received.items()}

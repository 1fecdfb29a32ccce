"""The directory of an adapter, in PEFT's shape: its files to an `Adapter` and back. Pure.

Owns what may stand in ``adapter_config.json``, ``adapter_model.safetensors`` and ``peerd.json``. A ``prompt`` is PEFT's prompt tuning
(`peft.PromptTuningConfig`), byte for byte what PEFT loads; ``deep-prompt``, for which PEFT has no type, is ours: the same files with
``peft_type`` ``PEERD_DEEP_PROMPT``. docs/training.md, section 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from overlay.rpc.types import Part
from peerd.adapters.adapter import DEEP_PROMPT, PROMPT, Adapter, ModelShape
from peerd.adapters.errors import BadAdapter
from peerd.adapters.limits import LENGTH_MAX, QUOTED_CHARS
from peerd.client.tensor_body import BadTensorBody, Tensor, decode, encode

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "peerd.json"
PICKLE = "adapter_model.bin"
PEFT_PROMPT, PEFT_DEEP_PROMPT = "PROMPT_TUNING", "PEERD_DEEP_PROMPT"
PROMPT_EMBEDDINGS, DEEP_PROMPTS = "prompt_embeddings", "deep_prompts"
FORMAT = 1
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS = {name: code for code, name in _DTYPES.items()}
_WHY_NOT = {
    "PREFIX_TUNING": "keys and values of its own for every block, which servers don't take",
    "LORA": "changes to the weights of the blocks, which servers don't take yet",
    "P_TUNING": "a network that makes its prompt",
    "MULTITASK_PROMPT_TUNING": "one prompt for each of many tasks",
    "IA3": "factors inside the blocks, which servers don't take",
}


@dataclass(frozen=True, slots=True)
class Files:
    """What lies in the directory; ``None``: nothing of that name."""

    config: bytes | None
    tensors: bytes | None
    ours: bytes | None
    has_pickle: bool = False


def read_adapter(name: str, files: Files) -> Adapter:
    """Raises BadAdapter, in a sentence that names the file."""
    config = _object(name, CONFIG, files.config)
    kind = str(config.get("peft_type"))[:QUOTED_CHARS]
    if kind not in (PEFT_PROMPT, PEFT_DEEP_PROMPT):
        why = f", which is {_WHY_NOT[kind]}" if kind in _WHY_NOT else ""
        raise BadAdapter(
            f"The adapter {name} is of the type {kind}{why}; what can be used here is a prompt ({PEFT_PROMPT}) or a deep-prompt."
        )
    if files.tensors is None:
        if files.has_pickle:
            raise BadAdapter(
                f"The adapter {name} has its values in {PICKLE}, which could run code; save it as {TENSORS}."
            )
        raise BadAdapter(f"The adapter {name} has no {TENSORS}.")
    _check_config(name, config)
    ours = {} if files.ours is None else _object(name, OURS, files.ours)
    tensors = _tensors(name, files.tensors)
    length = _count(name, config, "num_virtual_tokens")
    if length is None or not 1 <= length <= LENGTH_MAX:
        raise BadAdapter(f"The adapter {name} says no num_virtual_tokens from 1 to {LENGTH_MAX} in its {CONFIG}.")
    deep = kind == PEFT_DEEP_PROMPT
    prefix, prompts = _parts(name, tensors, length, deep=deep)
    stated = ours.get("model")
    model = stated if isinstance(stated, dict) else {}
    return Adapter(
        name,
        DEEP_PROMPT if deep else PROMPT,
        prefix,
        prompts,
        str(model.get("id", "")),
        str(model.get("name", ""))[:QUOTED_CHARS],
        _count(name, config, "num_layers"),
        _count(name, config, "num_attention_heads"),
        _count(name, config, "token_dim"),
    )


def write_adapter(
    name: str, model: ModelShape, prefix: Part | None, prompts: Part | None, trained: Mapping[str, Any]
) -> Files:
    """The files of an adapter for ``model``; ``trained`` is how it came to be. Raises BadAdapter for values that can't be one."""
    deep = prompts is not None
    first = prefix if prefix is not None else prompts
    if first is None:
        raise BadAdapter(f"The adapter {name} would be empty.")
    length = first.shape[-2]
    tensors = {}
    for title, part in ((PROMPT_EMBEDDINGS, prefix), (DEEP_PROMPTS, prompts)):
        if part is not None:
            tensors[title] = Tensor(_SAFETENSORS[part.dtype], part.shape, part.data)
    _parts(name, tensors, length, deep=deep)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "num_attention_heads": model.heads,
        "num_layers": model.blocks,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": PEFT_DEEP_PROMPT if deep else PEFT_PROMPT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": model.embedding_width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    ours = {
        "format": FORMAT,
        "model": {"id": model.model_id, "name": model.name, "compute_class": model.compute_class},
        "trained": dict(trained),
    }
    body = b"".join(bytes(piece) for piece in encode(tensors, {"format": "pt"}))
    return Files(_json(config), body, _json(ours))


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _object(name: str, file: str, data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise BadAdapter(f"The adapter {name} has no {file}.")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"The {file} of the adapter {name} is not JSON.") from error
    if not isinstance(document, dict):
        raise BadAdapter(f"The {file} of the adapter {name} is not an object.")
    return document


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    if config.get("modules_to_save"):
        raise BadAdapter(
            f"The adapter {name} also changes modules of the model (modules_to_save), which can't be used here."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise BadAdapter(f"The adapter {name} is for {str(config['task_type'])[:40]}; only CAUSAL_LM can be used here.")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise BadAdapter(f"The adapter {name} is for a model with an encoder (num_transformer_submodules is not 1).")


def _count(name: str, config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    if value is not None and (type(value) is not int or value < 1):
        raise BadAdapter(f"The adapter {name} has a {field} that is no positive whole number in its {CONFIG}.")
    return value


def _tensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return decode(data)[0]
    except BadTensorBody as error:
        raise BadAdapter(f"The {TENSORS} of the adapter {name} can't be read: {error}.") from error


def _parts(name: str, tensors: Mapping[str, Tensor], length: int, *, deep: bool) -> tuple[Part | None, Part | None]:
    """Prefix and prompts, checked."""
    known = (PROMPT_EMBEDDINGS, DEEP_PROMPTS) if deep else (PROMPT_EMBEDDINGS,)
    for title in tensors:
        if title not in known:
            raise BadAdapter(f"The adapter {name} has a tensor {title[:80]!r}; there may be: {', '.join(known)}.")
    needed = DEEP_PROMPTS if deep else PROMPT_EMBEDDINGS
    if needed not in tensors:
        raise BadAdapter(f"The adapter {name} has no tensor {needed} in its {TENSORS}.")
    parts = {title: _part(name, title, tensor) for title, tensor in tensors.items()}
    prefix, prompts = parts.get(PROMPT_EMBEDDINGS), parts.get(DEEP_PROMPTS)
    if prefix is not None and (len(prefix.shape) != 2 or prefix.shape[0] != length or not prefix.shape[1]):
        raise BadAdapter(
            f"The {PROMPT_EMBEDDINGS} of the adapter {name} have the shape {prefix.shape}, and should have ({length}, token_dim)."
        )
    if prompts is not None and (len(prompts.shape) != 3 or prompts.shape[1] != length or not all(prompts.shape)):
        raise BadAdapter(
            f"The {DEEP_PROMPTS} of the adapter {name} have the shape {prompts.shape}, and should have (blocks, {length}, d_model)."
        )
    return prefix, prompts


def _part(name: str, title: str, tensor: Tensor) -> Part:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise BadAdapter(f"The {title} of the adapter {name} are {tensor.dtype}; they may be {', '.join(_DTYPES)}.")
    if tensor.dtype == "BF16":
        exponents = np.frombuffer(tensor.data, "<u2") & 0x7F80
        finite = bool((exponents != 0x7F80).all())
    else:
        finite = bool(np.isfinite(np.frombuffer(tensor.data, np.dtype(dtype))).all())
    if not finite:
        raise BadAdapter(f"The {title} of the adapter {name} have values that are infinite or not a number.")
    return Part(title, dtype, tensor.shape, tensor.data)

"""A config to a `transformers` model of which only some parts exist: the whole class, with the blocks cut to what is wanted.

Owns the refusal of models that can't be served (in words) and the one way in which weights enter modules: `from_pretrained` of
the model's own class, so that renamed and fused tensors, types kept in float32 and tied weights come out as the reference has
them. No family is named here. Never runs a repository's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from blocks.model.errors import BadModel, UnsupportedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BRIEF_CHARS = 300
_FOREIGN_PARTS = ("vision_config", "audio_config", "speech_config", "vq_config")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where a model keeps its blocks: ``decoder`` is the module that runs them, ``blocks`` the list in it."""

    model: PreTrainedModel
    decoder: nn.Module
    blocks_name: str

    @property
    def blocks(self) -> nn.ModuleList:
        found = getattr(self.decoder, self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found


def read_config(fields: Mapping[str, Any]) -> PretrainedConfig:
    """A config object of a supported type.

    Raises:
        UnsupportedModel: the type is unknown to the installed `transformers`, or not a plain decoder; says why.
        BadModel: fields don't fit the type.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own_code = " and its repository's own code is never run" if "auto_map" in fields else ""
        raise UnsupportedModel(f"The model type {str(kind)[:80]!r} is unknown to the installed transformers{own_code}.")
    if fields.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"{kind} is an encoder-decoder: only decoder-only language models can be cut into spans."
        )
    if any(fields.get(part) for part in _FOREIGN_PARTS):
        raise UnsupportedModel(f"{kind} has vision or audio parts: only text-only decoders can be cut into spans.")
    if fields.get("quantization_config"):
        raise UnsupportedModel("The weights are already quantised: give the original ones, and --quant to quantise.")
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[kind].from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadModel(
            f"The config.json of this {kind} model doesn't fit its type ({_brief(error)}): fetch it again."
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{kind} is an encoder-decoder: only decoder-only language models can be cut into spans."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{kind} is no causal language model: there is nothing to generate with.")
    return config


def parse_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``."""
    if name not in DTYPES:
        raise UnsupportedModel(f"The dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def build(
    config: PretrainedConfig,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    prepare: Callable[[Anatomy], None] | None = None,
    device: str = "cpu",
) -> Anatomy:
    """Build a model's own class without memory, let ``prepare`` remove what isn't wanted, and load ``tensors`` into the rest.

    Raises:
        BadModel: a tensor is missing or has the wrong shape; it is named.
        UnsupportedModel: the class has no list of blocks.
    """
    original = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    blocks = config.get_text_config(decoder=True).num_hidden_layers

    def create(self: Any, *arguments: Any, **options: Any) -> None:
        original.__init__(self, *arguments, **options)
        if prepare:
            prepare(find_blocks(self, blocks))

    trimmed: Any = type(original.__name__, (original,), {"__init__": create, "__module__": original.__module__})
    try:
        with quiet_transformers():
            model, report = trimmed.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise BadModel(
            f"The weights don't fit the config of this {config.model_type} model: {_brief(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadModel(f"The weights lack {missing[0]} and {len(missing) - 1} more tensors: fetch them again.")
    model.requires_grad_(False).eval().to(device)
    return find_blocks(model, blocks)


def find_blocks(model: PreTrainedModel, count: int) -> Anatomy:
    """The list of ``count`` blocks in a model, and the module that runs it."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count and _is_block_list(child):
                return Anatomy(model, module, name)
    raise UnsupportedModel(f"{model.config.model_type} keeps its blocks in no plain list, so it can't be cut.")


def _brief(error: Exception) -> str:
    """A library's message on one line."""
    return " ".join(str(error).split())[:_BRIEF_CHARS]


def _is_block_list(blocks: nn.ModuleList) -> bool:
    """Blocks are modules that hold modules; a list of norms or of linears is none."""
    return all(any(True for _ in block.children()) or isinstance(block, Absent) for block in blocks)


class Absent(nn.Module):
    """A block that is elsewhere: passes its input on, and answers what its list's owner asks blocks about themselves."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if not name.startswith("_") and isinstance(value, str | int | float | bool | type(None)):
                setattr(self, name, value)

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep `transformers`' load reports and progress bars from people; what matters is raised."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

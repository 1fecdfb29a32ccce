"""`RemoteModelForCausalLM`: the model's own `transformers` class, with its blocks at the daemon's servers.

Owns what differs from a local model: the decoder's forward tells its stand-ins about padding, positions and the cache
(`peerd.client.torch.blocks`), and `generate` keeps sessions. Embeddings, norm, head, loss and sampling are the class's own code.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from blocks.model.architecture import Anatomy
from peerd.client.torch.blocks import Pass, cuts_of, learn_result_kind, passing, stand_ins
from peerd.client.torch.cache import RemoteCache
from peerd.client.torch.calls import ServedModel
from peerd.client.torch.loading import DEFAULT_WAIT_S, load
from peerd.client.torch.span import RemoteBlocks

_DEEP_PROMPTS: ContextVar[torch.Tensor | None] = ContextVar("deep prompts", default=None)
_CACHES: ContextVar[list[RemoteCache] | None] = ContextVar("caches made by generate", default=None)


class RemoteModelForCausalLM:
    """A causal language model whose blocks are remote; made by `from_pretrained`, an instance of the model's own class too."""

    _anatomy: Anatomy
    _remote: RemoteBlocks

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("a remote model is made by RemoteModelForCausalLM.from_pretrained")

    @classmethod
    def from_pretrained(
        cls, model: str, *, socket: str | os.PathLike[str] | None = None, wait_s: float = DEFAULT_WAIT_S
    ) -> Any:
        """A model of the swarm.

        Its embeddings, norm and head are loaded here, frozen and in the type that its servers compute in: from the model's files
        where they are here (or at the hub), else from the daemon.

        Args:
            model: ``demo``, a directory, a hub id (``owner/name``), or the name of a model that the daemon knows: what ``--model`` takes.
            socket: the daemon's; None: ``PEERD_SOCKET``, else the usual place.
            wait_s: how long calls wait for blocks that nobody serves.

        Raises:
            PeerdError: the model's files can't be used. ClientError: the daemon can't be reached, or doesn't know the model.
        """
        anatomy, served = load(model, socket, wait_s)
        return make_remote(anatomy, served)

    @property
    def blocks(self) -> RemoteBlocks:
        """The model's blocks: ``model.blocks[3:7](hidden)``."""
        return self._remote

    def new_cache(self, max_tokens: int) -> RemoteCache:
        """Sessions for a batch of texts of at most ``max_tokens``: ``past_key_values`` of forward and generate."""
        return RemoteCache(self._remote.model, max_tokens)

    def generate(self, *arguments: Any, deep_prompts: torch.Tensor | None = None, **options: Any) -> Any:
        """As in `transformers`, greedy or sampling; the sessions are deleted at the end, unless the cache is returned.

        ``deep_prompts`` (blocks, length, d_model) are added before each block at a row's first tokens.
        """
        made: list[RemoteCache] = []
        token, deep = _CACHES.set(made), _DEEP_PROMPTS.set(deep_prompts)
        result = None
        try:
            result = _parent(self).generate(*arguments, **options)
            return result
        finally:
            _CACHES.reset(token)
            _DEEP_PROMPTS.reset(deep)
            returned = getattr(result, "past_key_values", None)
            for cache in made:
                if cache is not returned:
                    cache.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_length: int,
    ) -> None:
        """`transformers`' place to make a cache: ours, for the modes that need no forks."""
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"{generation_mode.value} is refused: sessions of the swarm can't be forked; use greedy search or sampling."
            )
        if generation_config.cache_implementation is not None:
            raise ValueError("cache_implementation is refused: keys and values are with the servers.")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            served, mask = self._remote.model, model_kwargs.get("attention_mask")
            # One more than transformers counts: the servers' last token, too, passes through all blocks.
            total = min(max_length + 1, served.max_positions)
            after_first = total if mask is None else max(0, total - mask.shape[-1])
            cache = RemoteCache(served, total, after_first)
            made = _CACHES.get()
            if made is not None:
                made.append(cache)
            model_kwargs["past_key_values"] = cache

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: what is here is no whole model, and would be taken for one."""
        raise ValueError(
            "save_pretrained is refused: the blocks are with the servers; save what you trained (torch.save, or peft's save_pretrained)."
        )

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Nothing: servers recompute their blocks in backward, always."""


def make_remote(anatomy: Anatomy, served: ServedModel) -> Any:
    """Turn a model with stand-ins for blocks into one of its class that reaches the daemon."""
    model, decoder = anatomy.model, anatomy.decoder
    config = model.config
    width = config.get_text_config(decoder=True).hidden_size
    learn_result_kind(anatomy, width, model.get_input_embeddings().weight.shape[1], model.dtype)
    if isinstance(decoder, PreTrainedModel):
        maybe_install_capturing_hooks(decoder)
    for block in stand_ins(anatomy):
        block.watched_from = len(block._forward_hooks)
    # Sessions keep memory of servers, so a plain forward makes none unless it is asked to.
    config.use_cache = False
    remote = RemoteBlocks(served, 0, served.blocks)
    model._anatomy, model._remote = anatomy, remote
    original: Any = type(model)
    model.__class__ = _derived(original, (RemoteModelForCausalLM,), _model_forward(original))
    # The decoder may be the model's own class, or a part that others call too: whoever calls it, its stand-ins have to hear.
    decoder.__class__ = _derived(type(decoder), (), _decoder_forward(type(decoder), anatomy, remote))
    return model


def _parent(model: Any) -> Any:
    return super(RemoteModelForCausalLM, model)


def _derived(original: type[Any], first: tuple[type[Any], ...], forward: Callable[..., Any]) -> type[Any]:
    """A class of the original's name, by which `transformers` looks things up."""
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "forward": forward}
    return type(original.__name__, (*first, original), named)


def _model_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The class's forward, with ``deep_prompts`` (blocks, length, d_model) beside its own arguments."""
    inner: Callable[..., Any] = original.forward

    @functools.wraps(inner)
    def forward(self: nn.Module, *arguments: Any, deep_prompts: torch.Tensor | None = None, **options: Any) -> Any:
        # Those that generate was given reach its forwards from there.
        token = _DEEP_PROMPTS.set(_DEEP_PROMPTS.get() if deep_prompts is None else deep_prompts)
        try:
            return inner(self, *arguments, **options)
        finally:
            _DEEP_PROMPTS.reset(token)

    return forward


def _decoder_forward(original: type[nn.Module], anatomy: Anatomy, remote: RemoteBlocks) -> Callable[..., Any]:
    """The decoder's forward, after what its stand-ins have to know was taken from its arguments."""
    inner: Callable[..., Any] = original.forward
    signature = inspect.signature(inner)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(inner)
    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        bound = dict(signature.bind_partial(self, *arguments, **options).arguments)
        bound.pop("self", None)
        bound |= bound.pop(rest, {}) if rest is not None else {}
        config: Any = self.config
        _refuse(bound, config)
        cache = bound.get("past_key_values")
        if cache is None and bound.get("use_cache"):
            cache = bound["past_key_values"] = RemoteCache(remote.model, remote.model.max_positions)
        if cache is None:
            bound["use_cache"] = False
        elif "position_ids" in signature.parameters and bound.get("position_ids") is None:
            bound["position_ids"] = _positions(bound.get("attention_mask"), bound)
        shown = bound.get("output_hidden_states")
        everywhere = bool(config.output_hidden_states if shown is None else shown)
        this = Pass(
            remote,
            bound.get("attention_mask"),
            bound.get("position_ids"),
            _DEEP_PROMPTS.get(),
            cache,
            cuts_of(stand_ins(anatomy), everywhere=everywhere),
        )
        with passing(this):
            return inner(self, **bound)

    return forward


def _refuse(bound: dict[str, Any], config: Any) -> None:
    """What servers don't give, or can't be told."""
    for name in ("output_attentions", "output_router_logits"):
        if bound.get(name) or (bound.get(name) is None and getattr(config, name, False)):
            raise ValueError(f"{name} is refused: servers send hidden states only.")
    mask = bound.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise ValueError(
            "attention_mask has to be (rows, tokens), 1 where there is a token: servers know no other masks."
        )
    cache, positions = bound.get("past_key_values"), bound.get("position_ids")
    if mask is None and cache is None and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids that jump mean packed texts, which servers don't know: give an attention_mask, too."
        )
    if cache is not None and not isinstance(cache, RemoteCache):
        raise ValueError(
            "past_key_values has to be a RemoteCache (model.new_cache): keys and values are with the servers."
        )


def _positions(mask: torch.Tensor | None, bound: dict[str, Any]) -> torch.Tensor | None:
    """Positions of new tokens where rows have padding, which sessions never see; None: the decoder's own are right."""
    if mask is None or bool(mask.all()):
        return None
    inputs = bound["input_ids"] if bound.get("inputs_embeds") is None else bound["inputs_embeds"]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]

"""A `transformers` cache whose keys and values are with the servers: one session of hidden states per row.

Owns the sessions' life at the daemon (opened at a row's first token, deleted with the cache) and each row's length without its padding:
sessions see whole texts only, as if each row had been alone. docs/training.md, section 5.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from peerd.client.client import ANSWER_TIMEOUT_S, TENSORS_TYPE
from peerd.client.errors import BadAnswer, ClientError
from peerd.client.tensor_body import encode
from peerd.client.torch.calls import ServedModel, pack, unpack

PATH = "/api/v0/sessions"
STEPS_AT_ONCE = 16
CLOSE_TIMEOUT_S = 5.0


class RemoteCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Sessions for the rows of one batch, for inference alone.

    Use it as a context manager, or `close` it; one that is forgotten deletes its sessions when it is collected.

    Args:
        max_tokens: of the longest row; servers keep memory free for as many.
        after_first: of caches that generate makes: how many follow the first step's, which may bring more than was counted, since `peft`
            puts its prompt in front. 0: nothing but ``max_tokens`` counts.
    """

    def __init__(self, model: ServedModel, max_tokens: int, after_first: int = 0) -> None:
        self._length = _Length()
        super().__init__(layers=[self._length])
        self._model = model
        self._max_tokens = max_tokens
        self._after_first = after_first
        self._prompts: torch.Tensor | None = None
        self._sessions: list[_Session] = []
        self._seen = torch.zeros((0, 0), dtype=torch.bool)  # (rows, columns): where there was a token
        self._finalizer = weakref.finalize(self, _close_all, self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the sessions; the cache is empty afterwards."""
        _close_all(self._sessions)
        self._seen = torch.zeros((0, 0), dtype=torch.bool)
        self._length.count = 0

    def step(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all blocks over new columns.

        Args:
            hidden: (rows, columns, d_model).
            mask: (rows, columns so far and new ones), 1 where there is a token; None: everywhere.
            positions: (rows, columns) of the new ones, which have to be those of the texts without padding; None: they are.
            prompts: (blocks, length, d_model), added before each block at a row's first tokens; the same in every step, or None.

        Returns:
            (rows, columns, d_model); zeros where there is no token.
        """
        rows, columns = hidden.shape[:2]
        new = torch.ones((rows, columns), dtype=torch.bool) if mask is None else mask[:, -columns:].bool().cpu()
        self._check(rows, new, positions)
        self._check_prompts(prompts)
        if not self._sessions:
            widened = min(columns + self._after_first, self._model.max_positions) if self._after_first else 0
            room = max(self._max_tokens, widened)
            self._prompts = None if prompts is None else prompts.detach().clone()
            self._sessions += [_Session(self._model, room, self._prompts) for _ in range(rows)]
            self._seen = torch.zeros((rows, 0), dtype=torch.bool)
        places = [new[row].nonzero().flatten().to(hidden.device) for row in range(rows)]
        lengths = self._seen.sum(1).tolist()
        chosen = [row for row in range(rows) if len(places[row])]
        inputs = [hidden[row, places[row]] for row in chosen]
        sessions = [self._sessions[row] for row in chosen]
        output = torch.zeros_like(hidden)
        for row, result in zip(chosen, _steps(sessions, inputs, [lengths[row] for row in chosen]), strict=True):
            output[row, places[row]] = result
        self._seen = torch.cat([self._seen, new], dim=1)
        self._length.count += columns
        return output

    def _check(self, rows: int, new: torch.Tensor, positions: torch.Tensor | None) -> None:
        if self._sessions and rows != len(self._sessions):
            raise ValueError(f"this cache has {len(self._sessions)} rows, and {rows} came")
        if positions is None:
            return
        before = self._seen.sum(1, keepdim=True) if self._sessions else torch.zeros((rows, 1), dtype=torch.long)
        expected = before + new.cumsum(1) - 1
        if (positions.cpu().expand(rows, -1)[new] != expected[new]).any():
            raise ValueError(
                "with a RemoteCache positions count a row's tokens without its padding; leave position_ids out"
            )

    def _check_prompts(self, prompts: torch.Tensor | None) -> None:
        if not self._sessions:
            return
        before = self._prompts
        same = prompts is before if prompts is None or before is None else torch.equal(prompts, before)
        if not same:
            raise ValueError("this cache began with other deep prompts, or none: use a new one")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; the servers do so with the next step."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes how many tokens to remove, as a negative number")
        kept = max(0, self._seen.shape[1] + tokens_to_remove)
        self._seen = self._seen[:, :kept]
        self._length.count = kept

    def reset(self) -> None:
        self.close()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise ValueError("a RemoteCache can't be reordered: beam search needs sessions that can be forked")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("a RemoteCache can't be repeated: sessions can't be forked yet")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ValueError("a RemoteCache keeps its rows: sessions can't be moved yet")


class _Length(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """What decoders ask a cache: how many columns it has."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_seq_length(self) -> int:
        return self.count

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.count + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise ValueError("keys and values are with the servers")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        raise ValueError("keys and values are with the servers")


class _Session:
    """One row's session at the daemon, opened by its first step."""

    def __init__(self, model: ServedModel, max_tokens: int, prompts: torch.Tensor | None) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._prompts = prompts
        self._path: str | None = None

    def step(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """Hidden (tokens, d_model) from ``position`` on, through all blocks."""
        model = self._model
        if self._path is None:
            self._path = f"{PATH}/{self._open()}"
        row = hidden[None]
        given = {"hidden": pack(row, model.dtype)}
        answer, _ = model.client.tensors(f"{self._path}/step", given, {"position": str(position)})
        return unpack(answer, "hidden", row)[0]

    def _open(self) -> str:
        model, wanted = self._model, {"model": self._model.identity, "max_tokens": self._max_tokens}
        if self._prompts is None:
            opened = model.client.call("POST", PATH, wanted, ANSWER_TIMEOUT_S)
        else:
            settings = {name: str(value) for name, value in wanted.items()}
            body = b"".join(encode({"prompts": pack(self._prompts, model.dtype)}, settings))
            opened = model.client.send("POST", PATH, body, TENSORS_TYPE, ANSWER_TIMEOUT_S)
        if not isinstance(opened.get("id"), str):
            raise BadAnswer("The daemon opened no session; is the daemon of another version?")
        return str(opened["id"])

    def close(self) -> None:
        """Free what the servers hold; a daemon that is gone has freed it."""
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(ClientError):
                self._model.client.call("DELETE", path, None, CLOSE_TIMEOUT_S)


def _steps(
    sessions: Sequence[_Session], inputs: Sequence[torch.Tensor], positions: Sequence[int]
) -> list[torch.Tensor]:
    """One step of each, at once, so that their servers can share the work."""
    if len(sessions) == 1:
        return [sessions[0].step(inputs[0], positions[0])]
    with ThreadPoolExecutor(min(STEPS_AT_ONCE, max(1, len(sessions))), thread_name_prefix="session") as pool:
        return list(pool.map(_Session.step, sessions, inputs, positions))


def _close_all(sessions: list[_Session]) -> None:
    while sessions:
        sessions.pop().close()

"""One model's tensor calls: torch tensors to the daemon and back.

Owns the conversion (to the model's own type, on the CPU, without copies where none is needed) and the answer to a tape that is gone.
Knows no autograd and no `transformers`; safe to be used from several threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peerd.client.client import Client
from peerd.client.errors import ApiError, BadAnswer
from peerd.client.tensor_body import Tensor

TYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL", torch.float64: "F64",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
FLOATS = ("F32", "F16", "BF16")
TAPE_GONE = "tape-gone"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the daemon knows it.

    Attributes:
        client: the daemon.
        identity: the model's id, in hex.
        max_positions: its context.
        dtype: what its servers compute in.
        wait_s: how long a call may wait for blocks that nobody serves.
    """

    client: Client
    identity: str
    name: str
    blocks: int
    max_positions: int
    dtype: torch.dtype
    wait_s: float


@dataclass(frozen=True, slots=True)
class SpanCall:
    """Blocks [start, end) over one batch, but for its hidden states and prompts.

    Attributes:
        mask: (rows, tokens), 1 where there is a token, or None.
        positions: (rows, tokens), or None.
    """

    model: ServedModel
    start: int
    end: int
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def forward(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, *, keep_tape: bool
    ) -> tuple[torch.Tensor, str | None]:
        """The output, like ``hidden`` in shape, type and place, and the id of its tape if the daemon keeps one."""
        settings = self._settings() | ({"tape": "keep"} if keep_tape else {})
        answer, told = self.model.client.tensors("/api/v0/forward", self._inputs(hidden, prompts), settings)
        return unpack(answer, "hidden", hidden), told.get("tape")

    def backward(
        self, tape: str | None, hidden: torch.Tensor, prompts: torch.Tensor | None, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of ``hidden`` and of ``prompts``; everything is sent again where the tape is gone."""
        given = {"grad": pack(grad, self.model.dtype)}
        client = self.model.client
        if tape is not None:
            try:
                answer, _ = client.tensors("/api/v0/backward", given, {"tape": tape, "timeout": str(self.model.wait_s)})
            except ApiError as error:
                if error.code != TAPE_GONE:
                    raise
                tape = None
        if tape is None:
            answer, _ = client.tensors("/api/v0/backward", given | self._inputs(hidden, prompts), self._settings())
        return unpack(answer, "hidden", hidden), None if prompts is None else unpack(answer, "prompts", prompts)

    def _settings(self) -> dict[str, str]:
        model = self.model
        return {
            "model": model.identity, "start": str(self.start), "end": str(self.end), "timeout": str(model.wait_s),
        }  # fmt: skip

    def _inputs(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> dict[str, Tensor]:
        given = {"hidden": pack(hidden, self.model.dtype)}
        if self.mask is not None:
            given["attention_mask"] = pack(self.mask, torch.uint8)
        if self.positions is not None:
            given["position_ids"] = pack(self.positions, torch.int64)
        if prompts is not None:
            given["prompts"] = pack(prompts, self.model.dtype)
        return given


def pack(tensor: torch.Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor's bytes, from where they lie if they are on the CPU in that type already."""
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return Tensor(TYPE_NAMES[dtype], tuple(tensor.shape), memoryview(array))


def unpack(answer: dict[str, Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor of an answer, in the type and place of ``like``."""
    found = answer.get(name)
    if found is None or found.dtype not in FLOATS or found.shape != tuple(like.shape):
        raise BadAnswer(f"The daemon's answer has no sound {name}; is the daemon of another version?")
    return as_torch(found).to(like.device, like.dtype)


def as_torch(tensor: Tensor) -> torch.Tensor:
    """A tensor over the bytes that came. Raises BadAnswer for a type that nothing is computed in."""
    dtype = _TYPES.get(tensor.dtype)
    if dtype is None:
        raise BadAnswer(f"The daemon sent a tensor of the type {tensor.dtype}; is the daemon of another version?")
    if not len(tensor.data):
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)

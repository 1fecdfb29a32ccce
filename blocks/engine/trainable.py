"""What a training job learns: float32 master tensors by name, and their AdamW.

Owns values and moments, clipping, and skipping gradients that aren't finite; its state goes to and from safetensors bytes without losing
a bit. Knows nothing of models, batches or files. AdamW is torch's own, tensor by tensor (Loshchilov and Hutter, 2019), so that
nothing depends on how tensors would be grouped. Use from one thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from blocks.engine.parts import array_of, part_of
from overlay.rpc.types import Part

_VALUE, _MEAN, _SQUARE = "value/", "mean/", "square/"
_COUNTS = "counts"
"""Steps taken and steps skipped."""


@dataclass(frozen=True, slots=True)
class AdamW:
    """The optimizer's settings. ``clip``: the gradients' largest norm over all tensors together; None: any."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """``norm``: of all gradients together, before clipping; not finite where the step was skipped."""

    norm: float
    skipped: bool


class Trainable:
    """See the module.

    Args:
        values: float32 parts by name; copied.

    Raises:
        ValueError: one isn't float32.
    """

    def __init__(self, values: Mapping[str, Part], settings: AdamW) -> None:
        wrong = next((name for name in sorted(values) if values[name].dtype != "float32"), None)
        if wrong is not None or not values:
            raise ValueError(f"masters are float32, at least one: {wrong}")
        self._values = {name: array_of(values[name]).clone() for name in sorted(values)}
        self._settings = settings
        self._optimizer = torch.optim.AdamW(
            list(self._values.values()), betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
            foreach=False,
        )  # fmt: skip
        self.taken = 0
        self.skipped = 0

    def step(self, grads: Mapping[str, Part], lr: float) -> StepOutcome:
        """One step of AdamW at this learning rate; gradients that aren't finite change nothing and are counted.

        Args:
            grads: float32, of every tensor, each in its shape.

        Raises:
            ValueError: a gradient is missing, unknown or of another shape or dtype.
        """
        found = self._gradients(grads)
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in found.values()))
        if not math.isfinite(norm):
            self.skipped += 1
            return StepOutcome(norm, skipped=True)
        clip = self._settings.clip
        scale = 1.0 if clip is None or norm <= clip else clip / norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, value in self._values.items():
            value.grad = found[name] * scale
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        return StepOutcome(norm, skipped=False)

    def _gradients(self, grads: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        if sorted(grads) != list(self._values):
            raise ValueError(f"gradients of {sorted(grads)} for {list(self._values)}")
        for name, part in grads.items():
            if part.dtype != "float32" or part.shape != tuple(self._values[name].shape):
                raise ValueError(f"the gradient of {name} is {part.dtype} {part.shape}")
        return {name: array_of(grads[name]) for name in self._values}

    def parts(self) -> dict[str, Part]:
        """The masters as they are now; later steps don't change what was returned."""
        return {name: part_of(value.clone(), name) for name, value in self._values.items()}

    def state(self) -> bytes:
        """Masters, moments and counts as safetensors: all that `from_state` needs beside the settings."""
        tensors = {_COUNTS: torch.tensor([self.taken, self.skipped])}
        for name, value in self._values.items():
            tensors[_VALUE + name] = value
            moments = self._optimizer.state.get(value)
            if moments:
                tensors[_MEAN + name] = moments["exp_avg"]
                tensors[_SQUARE + name] = moments["exp_avg_sq"]
        return save(tensors)

    @classmethod
    def from_state(cls, data: bytes, settings: AdamW) -> Trainable:
        """What `state` wrote, going on as if nothing had been between, bit for bit.

        Raises:
            ValueError: the bytes are no such state.
        """
        try:
            tensors = load(data)
            names = [name.removeprefix(_VALUE) for name in tensors if name.startswith(_VALUE)]
            made = cls({name: part_of(tensors[_VALUE + name]) for name in names}, settings)
            made.taken, made.skipped = (int(count) for count in tensors[_COUNTS])
            for name, value in made._values.items():
                if made.taken:
                    made._optimizer.state[value] = {
                        "step": torch.tensor(float(made.taken)),
                        "exp_avg": tensors[_MEAN + name].reshape(value.shape),
                        "exp_avg_sq": tensors[_SQUARE + name].reshape(value.shape),
                    }
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"this is no state of a training: {error}") from error
        return made

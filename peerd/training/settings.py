"""What a training job is told: every setting with its default and its bounds, from and to JSON.

Pure. The settings alone (with the dataset and the model) decide every bit of a run in float32; which server computes what doesn't.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peerd.training import limits
from peerd.training.errors import BadSettings

PROMPT, DEEP_PROMPT = "prompt", "deep-prompt"
METHODS = (PROMPT, DEEP_PROMPT)
SCHEDULES = ("linear", "constant")
_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{limits.NAME_CHARS_MAX - 1}}}")

_ASIDE = ".new"
"""What ends so is being made, and belongs to no name yet."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """One job. Fields are named as in JSON and, with dashes, as the flags of `peerctl train`.

    Attributes:
        name: of the job, and of the adapter that it makes.
        model: as `peerctl generate --model`; None: the only one there is.
        length: rows of the prompt in front of the tokens (and, for deep prompts, rows added before every block).
        lr: the peak of the learning rate; warmup: steps until it is reached; schedule: what follows, down to 0 or level.
        batch: examples in a step; micro_batch: at most so many padded tokens travel together, whole examples, at least one.
        max_length: longest example in tokens; None: what the model's context leaves beside the prompt.
        eval_split: the share of the examples that is never trained on, for the loss before and after.
        checkpoint_every: in steps.
    """

    name: str
    model: str | None = None
    method: str = PROMPT
    length: int = 16
    lr: float = 0.1
    epochs: int = 3
    batch: int = 8
    micro_batch: int = 1024
    max_length: int | None = None
    eval_split: float = 0.1
    seed: int = 0
    warmup: int = 10
    schedule: str = "linear"
    clip: float = 1.0
    weight_decay: float = 0.0
    checkpoint_every: int = 20
    skip_bad: bool = False

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


_WHOLE = {
    "length": (1, limits.PROMPT_LENGTH_MAX),
    "epochs": (1, limits.EPOCHS_MAX),
    "batch": (1, limits.BATCH_MAX),
    "micro_batch": (1, limits.MICRO_BATCH_TOKENS_MAX),
    "max_length": (2, 1 << 24),
    "seed": (0, (1 << 63) - 1),
    "warmup": (0, limits.STEPS_MAX),
    "checkpoint_every": (1, limits.CHECKPOINT_EVERY_MAX),
}
_REAL = {"lr": (1e-9, 1e3), "eval_split": (0.0, 0.9), "clip": (1e-9, 1e9), "weight_decay": (0.0, 1e3)}
_CHOICES = {"method": METHODS, "schedule": SCHEDULES}
_OPTIONAL = ("model", "max_length")


def parse_settings(document: object) -> JobSettings:
    """Settings from a JSON value. Raises BadSettings with the field and what it may be."""
    if not isinstance(document, Mapping):
        raise BadSettings("The settings of a job are a JSON object; see docs/training.md.")
    known = [field.name for field in dataclasses.fields(JobSettings)]
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise BadSettings(f"There is no setting {str(key)[: limits.QUOTED_CHARS]!r}; {hint}", str(key))
    if "name" not in document:
        raise BadSettings("A job needs a name; its adapter gets the same.", "name")
    return JobSettings(**{name: _value(name, value) for name, value in document.items()})


def _value(name: str, value: Any) -> Any:
    if value is None and name in _OPTIONAL:
        return None
    if name == "name":
        return checked_name(value)
    if name in _WHOLE:
        low, high = _WHOLE[name]
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise _refused(name, value, f"a whole number from {low} to {high}")
    if name in _REAL:
        least, most = _REAL[name]
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        raise _refused(name, value, f"a number from {least:g} to {most:g}")
    if name in _CHOICES:
        if isinstance(value, str) and value in _CHOICES[name]:
            return value
        raise _refused(name, value, " or ".join(_CHOICES[name]))
    if name == "skip_bad":
        if isinstance(value, bool):
            return value
        raise _refused(name, value, "true or false")
    if isinstance(value, str) and value:
        return value
    raise _refused(name, value, "text")


def checked_name(value: object) -> str:
    """A name for a job. Raises BadSettings."""
    if isinstance(value, str) and _NAME.fullmatch(value) and not value.endswith(_ASIDE):
        return value
    raise BadSettings(
        f"{str(value)[: limits.QUOTED_CHARS]!r} can't name a job; use a to z, 0 to 9, -, _ and . (at most {limits.NAME_CHARS_MAX}, "
        "beginning with a letter or digit).",
        "name",
    )


def _refused(name: str, value: object, allowed: str) -> BadSettings:
    return BadSettings(f"{name} is {str(value)[: limits.QUOTED_CHARS]!r}, but must be {allowed}.", name)

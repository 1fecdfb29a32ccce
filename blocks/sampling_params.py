"""How the next token is chosen, as a value: checked once, then carried from the API to the sampler.

Torch-free. The ranges are those of the OpenAI API where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from overlay.errors import Blame, PeerdError

MAX_TEMPERATURE = 10.0
MAX_TOP_K = 1 << 31
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MIN_REPETITION_PENALTY = 0.01
SEED_BITS = 64
MAX_CHOICES = 128


class InvalidSampling(PeerdError):
    """A sampling setting is out of its range; the sentence names it."""

    code = "invalid-sampling"
    exit_code = 2
    http_status = 400
    retryable = False
    blame = Blame.USER


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The settings of one choice of one request.

    Attributes:
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: the smallest set of tokens with this much probability is sampled from.
        top_k: only this many of the likeliest tokens are sampled from; 0 is all.
        seed: with ``choice`` and the position, decides every draw: the same seed gives the same text.
        choice: which of several answers to one prompt this is.
        repetition_penalty: over 1 makes every token seen so far, the prompt's too, less likely (Keskar et al., 2019).
        presence_penalty: taken once from the logit of a token that the output already has.
        frequency_penalty: taken from the logit of a token for each time that the output has it.

    Raises:
        InvalidSampling: if a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidSampling("top_p must be over 0 and at most 1; for the likeliest token use temperature 0.")
        _check_whole("top_k", self.top_k, 0, MAX_TOP_K)
        _check_whole("seed", self.seed, -(1 << (SEED_BITS - 1)), (1 << SEED_BITS) - 1)
        _check_whole("choice", self.choice, 0, MAX_CHOICES - 1)
        _check_number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler has to see the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check_number(name: str, value: object, low: float, high: float) -> None:
    # NaN compares false with everything, so the range is tested in the positive.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidSampling(f"{name} must be a number from {low:g} to {high:g}, not {value!r:.40}.")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidSampling(f"{name} must be a whole number from {low} to {high}, not {value!r:.40}.")

"""Which examples make a step, in which order, and how they are cut into micro-batches.

Pure: a function of the settings, the dataset and the step alone, so that a resumed or differently served run repeats itself. The order
comes from a counter-based generator (`blocks.model.counter_random`): (seed, epoch) is all of its state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blocks.model.counter_random import words_below
from overlay.rpc.types import Part
from peerd.training.dataset import IGNORED, Example

_EPOCH_ORDER, _EVAL_SPLIT, _INITIAL = 1, 2, 3
"""Draws of different kinds have different streams of the generator."""
INITIAL_DEVIATION = 0.02
PADDING = 0
"""A token id that every model has; what stands behind an example's end counts nowhere."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The examples of every step of a run."""

    training: tuple[int, ...]
    evaluation: tuple[int, ...]
    batch: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.training) // self.batch)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def examples_of(self, step: int) -> tuple[int, ...]:
        """The examples of one step (from 0); the last of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _shuffled(len(self.training), self.seed, _EPOCH_ORDER, epoch)
        return tuple(self.training[index] for index in order[place * self.batch : (place + 1) * self.batch])


def make_plan(examples: int, *, batch: int, epochs: int, seed: int, eval_split: float) -> Plan:
    """Set the evaluation examples apart (a drawn share, rounded, at least one of two), and plan the rest."""
    held_out = 0 if eval_split == 0.0 else min(examples - 1, max(1, round(examples * eval_split)))
    order = _shuffled(examples, seed, _EVAL_SPLIT, 0)
    return Plan(tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out])), batch, epochs, seed)


@functools.lru_cache(maxsize=1)  # every step of an epoch asks for the same
def _shuffled(count: int, seed: int, choice: int, position: int) -> tuple[int, ...]:
    words = words_below(count, seed=seed, choice=choice, position=position)
    return tuple(np.argsort(words, kind="stable").tolist())


def cut(lengths: Sequence[int], prefix: int, tokens_max: int) -> tuple[tuple[int, ...], ...]:
    """Indices of examples in micro-batches: like lengths together, at most ``tokens_max`` padded tokens each, at least one example."""
    cuts: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda each: (lengths[each], each)):
        longest = prefix + lengths[index]  # lengths rise, so the newest is the longest
        if cuts and (len(cuts[-1]) + 1) * longest <= tokens_max:
            cuts[-1].append(index)
        else:
            cuts.append([index])
    return tuple(tuple(each) for each in cuts)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples side by side, padded at the end.

    Attributes:
        tokens: (rows, tokens) int32.
        labels: (rows, prefix + tokens) int32, `IGNORED` on the prefix and on padding.
        mask: (rows, prefix + tokens) uint8, 0 on padding; None where there is none.
        count: positions that count.
        real_tokens: without padding and prefix.
    """

    tokens: Part
    labels: Part
    mask: Part | None
    count: int
    real_tokens: int


def pack(examples: Sequence[Example], prefix: int) -> MicroBatch:
    """Pad examples at their ends to the longest of them."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.full((len(examples), longest), PADDING, np.int32)
    labels = np.full((len(examples), prefix + longest), IGNORED, np.int32)
    mask = np.zeros((len(examples), prefix + longest), np.uint8)
    for row, example in enumerate(examples):
        mask[row, : prefix + len(example.tokens)] = 1
        tokens[row, : len(example.tokens)] = example.tokens
        labels[row, prefix : prefix + len(example.labels)] = example.labels
    return MicroBatch(
        Part("tokens", "int32", tokens.shape, tokens.tobytes()),
        Part("labels", "int32", labels.shape, labels.tobytes()),
        None if mask.all() else Part("mask", "uint8", mask.shape, mask.tobytes()),
        sum(example.count for example in examples),
        sum(len(example.tokens) for example in examples),
    )


def initial_values(seed: int, rows: int, width: int) -> Part:
    """The first values of a prompt: normal, small, the same for the same seed on every machine (Box-Muller on counted words)."""
    count = rows * width
    words = words_below(2 * count, seed=seed, choice=_INITIAL, position=0).astype(np.float64)
    uniform = (words + 0.5) / 2.0**32
    normal = np.sqrt(-2.0 * np.log(uniform[:count])) * np.cos(2.0 * np.pi * uniform[count:])
    values = (INITIAL_DEVIATION * normal).astype(np.float32).reshape(rows, width)
    return Part("prefix", "float32", (rows, width), values.tobytes())

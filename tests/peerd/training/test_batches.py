from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peerd.training.batches import cut, initial_values, make_plan, pack
from peerd.training.dataset import IGNORED, Example

COUNTS = st.integers(1, 60)


def example(length: int, first: int = 5) -> Example:
    tokens = tuple(range(first, first + length))
    return Example(tokens, (IGNORED, *tokens[1:]))


@given(COUNTS, st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**63 - 1))
def test_every_epoch_takes_every_training_example_once_and_never_one_of_the_evaluation(
    examples: int, batch: int, epochs: int, seed: int
) -> None:
    plan = make_plan(examples, batch=batch, epochs=epochs, seed=seed, eval_split=0.2)
    assert sorted((*plan.training, *plan.evaluation)) == list(range(examples))
    assert plan.training
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        taken = [index for step in steps for index in plan.examples_of(step)]
        assert sorted(taken) == list(plan.training)
        assert all(1 <= len(plan.examples_of(step)) <= batch for step in steps)


def test_the_order_follows_the_seed_and_the_epoch_alone() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        plan = make_plan(40, batch=40, epochs=2, seed=seed, eval_split=0.0)
        return [plan.examples_of(step) for step in range(plan.steps)]

    assert orders(3) == orders(3)
    assert orders(3)[0] != orders(3)[1]
    assert orders(3) != orders(4)


def test_no_evaluation_split_keeps_every_example_for_training() -> None:
    assert make_plan(5, batch=2, epochs=1, seed=0, eval_split=0.0).evaluation == ()


def test_one_example_is_trained_on_rather_than_held_out() -> None:
    assert make_plan(1, batch=2, epochs=1, seed=0, eval_split=0.5).training == (0,)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 8), st.integers(1, 120))
def test_a_micro_batch_holds_the_bound_or_one_example_and_none_is_lost(
    lengths: list[int], prefix: int, tokens_max: int
) -> None:
    cuts = cut(lengths, prefix, tokens_max)
    assert sorted(index for each in cuts for index in each) == list(range(len(lengths)))
    for each in cuts:
        padded = len(each) * (prefix + max(lengths[index] for index in each))
        assert padded <= tokens_max or len(each) == 1


def test_like_lengths_travel_together() -> None:
    assert cut([9, 1, 8, 2], 0, 18) == ((1, 3), (2, 0))


def test_a_packed_batch_is_padded_at_the_end_behind_the_prefix() -> None:
    micro = pack([example(2), example(4)], prefix=3)
    tokens = np.frombuffer(micro.tokens.data, np.int32).reshape(micro.tokens.shape)
    labels = np.frombuffer(micro.labels.data, np.int32).reshape(micro.labels.shape)
    assert micro.mask is not None
    mask = np.frombuffer(micro.mask.data, np.uint8).reshape(micro.mask.shape)
    assert tokens.tolist() == [[5, 6, 0, 0], [5, 6, 7, 8]]
    assert labels.tolist() == [[IGNORED] * 4 + [6] + [IGNORED] * 2, [IGNORED] * 4 + [6, 7, 8]]
    assert mask.tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert (micro.count, micro.real_tokens) == (4, 6)


def test_a_batch_without_padding_needs_no_mask() -> None:
    assert pack([example(4), example(4)], prefix=2).mask is None


def test_initial_values_are_small_normal_and_of_the_seed() -> None:
    values = np.frombuffer(initial_values(1, 64, 128).data, np.float32)
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 0.02) < 1e-3
    assert initial_values(1, 4, 8) == initial_values(1, 4, 8)
    assert initial_values(1, 4, 8) != initial_values(2, 4, 8)

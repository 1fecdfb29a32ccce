"""The sampler against softmax, against hand-written references, and against itself on a replay."""

import numpy as np
import pytest
import torch

from blocks.model.counter_random import words_below
from blocks.model.sampling import gumbel, penalise, sample
from blocks.sampling_params import SamplingParams


def _logits(size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def _counts(logits: torch.Tensor, params: SamplingParams, draws: int) -> np.ndarray:
    counts = np.zeros(logits.shape[0])
    for position in range(draws):
        counts[sample(logits, params, position, (), 0)] += 1
    return counts


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    shown = expected > 0
    assert counts[~shown].sum() == 0
    return float((((counts - expected) ** 2)[shown] / expected[shown]).sum())


def test_greedy_takes_the_likeliest_and_the_lower_id_of_a_tie() -> None:
    assert sample(torch.tensor([0.0, 3.0, 1.0, 3.0]), SamplingParams(), 0, (), 0) == 1
    assert sample(torch.tensor([0.0, 3.0, 1.0, 3.0]).bfloat16(), SamplingParams(), 9, (), 0) == 1


def test_draws_follow_the_softmax() -> None:
    logits = _logits(12)
    draws = 4000
    counts = _counts(logits, SamplingParams(temperature=1.3, seed=5), draws)
    expected = torch.softmax(logits / 1.3, 0).double().numpy() * draws
    assert _chi_square(counts, expected) < 31.3  # 11 degrees of freedom, p = 0.001


def test_top_k_draws_follow_the_softmax_of_the_k_likeliest() -> None:
    logits = _logits(200)
    draws = 4000
    counts = _counts(logits, SamplingParams(temperature=1.0, top_k=6, seed=1), draws)
    kept = torch.full_like(logits, -torch.inf)
    top = logits.topk(6).indices
    kept[top] = logits[top]
    assert _chi_square(counts, torch.softmax(kept, 0).double().numpy() * draws) < 20.5  # 5 degrees, p = 0.001


def test_top_p_keeps_the_smallest_set_with_that_mass() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    for top_p, expected in [
        (0.05, {1}),
        (0.4 - 1e-4, {1}),
        (0.5, {1, 3}),
        (0.8, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
    ]:
        counts = _counts(logits, SamplingParams(temperature=1.0, top_p=top_p), 300)
        assert set(np.nonzero(counts)[0].tolist()) == expected, top_p


def test_top_p_sees_past_the_first_tokens_of_a_flat_vocabulary() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9)
    chosen = {sample(torch.zeros(5000), params, position, (), 0) for position in range(2000)}
    assert max(chosen) <= 4500  # ties go by id, so the first nine tenths are kept
    assert max(chosen) > 4300


def test_top_k_with_a_tie_at_its_edge_keeps_the_lower_ids() -> None:
    params = SamplingParams(temperature=1.0, top_k=3)
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])
    assert {sample(logits, params, position, (), 0) for position in range(300)} == {0, 1, 2}


def test_top_k_and_top_p_together_take_the_mass_among_the_k() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.55)  # 0.4 / 0.7 = 0.571
    assert {sample(logits, params, position, (), 0) for position in range(200)} == {0}


def test_candidates_draw_the_same_noise_as_the_whole_vocabulary() -> None:
    logits = _logits(64)
    everything = SamplingParams(temperature=0.7, seed=9)
    for position in range(50):
        free = sample(logits, everything, position, (), 0)
        assert sample(logits, SamplingParams(temperature=0.7, seed=9, top_k=64), position, (), 0) == free
        if free in logits.topk(4).indices.tolist():
            assert sample(logits, SamplingParams(temperature=0.7, seed=9, top_k=4), position, (), 0) == free


def test_the_chosen_tokens_never_change() -> None:
    logits = torch.linspace(0, 3, 50)
    params = SamplingParams(temperature=1.0, seed=42)
    assert [sample(logits, params, position, (), 0) for position in range(12)] == PINNED


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1000)
    draws = [
        sample(logits, SamplingParams(temperature=1.0, seed=seed, choice=choice), position, (), 0)
        for seed, choice, position in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len(set(draws)) == len(draws)


def test_penalties_equal_the_reference_written_by_hand() -> None:
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=-0.25)
    logits = _logits(10)
    tokens, prompt_length = [3, 3, 8, 1, 1, 1, 4], 3
    expected = logits.tolist()
    for token in (3, 8, 1, 4):
        expected[token] = expected[token] * 1.7 if expected[token] < 0 else expected[token] / 1.7
    for token, times in {1: 3, 4: 1}.items():
        expected[token] -= 0.5 - 0.25 * times
    before = logits.clone()
    assert penalise(logits, params, tokens, prompt_length).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(logits, before)


def test_penalties_change_the_greedy_choice() -> None:
    logits = torch.tensor([1.0, 1.1, 0.9])
    assert sample(logits, SamplingParams(presence_penalty=0.5), 1, [0, 1], 1) == 0
    assert sample(logits, SamplingParams(repetition_penalty=2.0), 1, [0, 1], 2) == 2
    assert sample(logits, SamplingParams(presence_penalty=0.5), 1, [0, 1], 2) == 1  # the prompt doesn't count


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = _logits(300)
    assert sample(logits, SamplingParams(temperature=temperature), 0, (), 0) == int(logits.argmax())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=1.0, top_p=0.5), SamplingParams(temperature=1.0, top_k=2)]
)
def test_broken_logits_still_give_a_token(bad: float, params: SamplingParams) -> None:
    assert 0 <= sample(torch.tensor([0.0, bad, 1.0, 2.0]), params, 0, (), 0) < 4


def test_the_noise_is_finite_at_both_ends_of_its_range() -> None:
    noise = gumbel(np.array([0, (1 << 32) - 1], dtype=np.uint32))
    assert np.isfinite(noise).all()
    assert noise[0] < -3
    assert noise[1] > 22
    assert abs(float(gumbel(words_below(200_000, seed=0, choice=0, position=0)).mean()) - 0.5772) < 0.01


PINNED = [4, 11, 37, 45, 48, 33, 47, 9, 41, 49, 37, 31]

"""Masters and their AdamW: torch's arithmetic, nothing lost in a checkpoint, nothing learned from what isn't a number."""

from __future__ import annotations

import math

import pytest
import torch

from blocks.engine.parts import array_of, part_of
from blocks.engine.trainable import AdamW, Trainable
from overlay.rpc.types import Part

SETTINGS = AdamW(betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, clip=1.0)
SHAPES = {"prefix": (3, 8), "prompts": (2, 3, 8)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def parts(seed: int, scale: float = 1.0) -> dict[str, Part]:
    return {name: part_of(tensor, name) for name, tensor in tensors(seed, scale).items()}


def rate(step: int) -> float:
    return 0.01 * (step + 1)


def test_steps_are_torchs_own_with_clipping_over_all_tensors_together() -> None:
    trainable = Trainable(parts(0), SETTINGS)
    plain = [tensor.requires_grad_() for tensor in tensors(0).values()]
    optimizer = torch.optim.AdamW(plain, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for step, scale in enumerate((1.0, 0.01, 5.0)):
        grads = tensors(step + 1, scale)
        for value, grad in zip(plain, grads.values(), strict=True):
            value.grad = grad.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(plain, 1.0))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        outcome = trainable.step(parts(step + 1, scale), rate(step))
        assert outcome.norm == pytest.approx(norm, rel=1e-5)
        assert not outcome.skipped
    for part, value in zip(trainable.parts().values(), plain, strict=True):
        torch.testing.assert_close(array_of(part), value.detach(), rtol=1e-5, atol=1e-7)


def test_a_run_from_its_state_goes_on_bit_for_bit() -> None:
    undisturbed = Trainable(parts(0), SETTINGS)
    for step in range(6):
        if step == 3:
            resumed = Trainable.from_state(undisturbed.state(), SETTINGS)
        undisturbed.step(parts(step + 1), rate(step))
    for step in range(3, 6):
        resumed.step(parts(step + 1), rate(step))
    assert resumed.parts() == undisturbed.parts()
    assert resumed.state() == undisturbed.state()
    assert (resumed.taken, resumed.skipped) == (6, 0)
    assert undisturbed.parts() != parts(0)


def test_a_state_before_the_first_step_is_a_state() -> None:
    fresh = Trainable.from_state(Trainable(parts(0), SETTINGS).state(), SETTINGS)
    other = Trainable(parts(0), SETTINGS)
    for each in (fresh, other):
        each.step(parts(1), 0.1)
    assert fresh.state() == other.state()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_change_nothing_and_are_counted(bad: float) -> None:
    trainable, undisturbed = Trainable(parts(0), SETTINGS), Trainable(parts(0), SETTINGS)
    spoiled = tensors(1)
    spoiled["prompts"][1, 2, 3] = bad
    outcome = trainable.step({name: part_of(tensor) for name, tensor in spoiled.items()}, 0.1)
    assert outcome.skipped
    assert trainable.parts() == undisturbed.parts() == parts(0)
    for each in (trainable, undisturbed):
        each.step(parts(2), 0.1)
    assert trainable.parts() == undisturbed.parts()
    assert Trainable.from_state(trainable.state(), SETTINGS).skipped == 1


def test_large_gradients_are_clipped_without_overflow() -> None:
    outcome = (trainable := Trainable(parts(0), SETTINGS)).step(parts(1, 1e30), 0.1)
    assert not outcome.skipped
    assert outcome.norm > 1e30
    assert all(array_of(part).isfinite().all() for part in trainable.parts().values())


def test_what_was_given_out_does_not_change_with_later_steps() -> None:
    trainable = Trainable(parts(0), SETTINGS)
    before = trainable.parts()
    trainable.step(parts(1), 0.1)
    assert before == parts(0)
    assert trainable.parts() != before


def test_gradients_that_do_not_fit_are_refused() -> None:
    trainable = Trainable(parts(0), SETTINGS)
    good = parts(1)
    for wrong in (
        {"prefix": good["prefix"]},
        good | {"other": good["prefix"]},
        good | {"prefix": part_of(torch.ones(3, 7))},
        good | {"prefix": part_of(torch.ones(3, 8).half())},
    ):
        with pytest.raises(ValueError, match="gradient"):
            trainable.step(wrong, 0.1)
    assert trainable.parts() == parts(0)


def test_masters_are_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        Trainable({"prefix": part_of(torch.ones(2, 2).bfloat16())}, SETTINGS)
    with pytest.raises(ValueError, match="at least one"):
        Trainable({}, SETTINGS)


def test_bytes_that_are_no_state_are_refused() -> None:
    for wrong in (b"", b"nonsense", bytes(64), Trainable(parts(0), SETTINGS).state()[:-4]):
        with pytest.raises(ValueError, match="no state of a training"):
            Trainable.from_state(wrong, SETTINGS)

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay.rpc.types import Part
from peerd.training.gradients import mean, narrowed, widened

FLOATS = st.lists(st.floats(width=32), min_size=1, max_size=30)


def part_of(values: list[float]) -> Part:
    return Part("p", "float32", (len(values),), np.array(values, np.float32).tobytes())


def as_torch(part: Part) -> torch.Tensor:
    return torch.frombuffer(bytearray(part.data), dtype=getattr(torch, part.dtype))


@given(FLOATS, st.sampled_from(["bfloat16", "float16"]))
def test_narrowing_rounds_as_torch_does(values: list[float], dtype: str) -> None:
    with np.errstate(over="ignore"):
        ours = as_torch(narrowed(part_of(values), dtype))
    theirs = torch.tensor(values, dtype=torch.float32).to(getattr(torch, dtype))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


@given(FLOATS)
def test_widening_gives_the_same_values_back(values: list[float]) -> None:
    narrow = narrowed(part_of(values), "bfloat16")
    assert np.array_equal(widened(narrow), as_torch(narrow).float().numpy(), equal_nan=True)


def test_a_mean_adds_in_the_order_of_the_parts() -> None:
    parts = [part_of([1e8]), part_of([1.0]), part_of([-1e8])]
    assert widened(mean("p", parts, 1)).tolist() == [0.0]
    assert widened(mean("p", [parts[0], parts[2], parts[1]], 4)).tolist() == [0.25]

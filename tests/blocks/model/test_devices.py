"""A device that isn't there is a sentence, and `auto` never asks for one."""

from __future__ import annotations

import pytest
import torch

from blocks.model.devices import usable_device
from blocks.model.errors import DeviceMissing


def devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("wanted", "count", "name"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_what_is_there_is_used(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, name: str) -> None:
    devices(monkeypatch, count)
    assert usable_device(wanted) == name


@pytest.mark.parametrize(("wanted", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("cuda:999", 1)])
def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int) -> None:
    devices(monkeypatch, count)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceMissing, match="use --device auto or cpu"):
        usable_device(wanted)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceMissing, match="built without CUDA"):
        usable_device(wanted)

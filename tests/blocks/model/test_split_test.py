"""The self-test of a model type says exact, limited or refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from blocks.model import split_test as split
from blocks.model.errors import UnsupportedModel
from blocks.model.source import resolve
from blocks.model.span import Span
from blocks.model.split_test import require_exact, shrink, split_test
from tests.models import make_tiny


def default(kind: str) -> dict[str, Any]:
    fields: dict[str, Any] = CONFIG_MAPPING[kind]().to_dict()
    return fields | {"model_type": kind}


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_ordinary_decoders_are_proven_exact(kind: str) -> None:
    verdict = split_test(default(kind))
    assert (verdict.verdict, verdict.reason) == ("exact", "")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("mamba", "recurrent"),
        ("bert", "can't be driven"),
        ("vit", "doesn't say how many|no causal"),
    ],
)
def test_what_can_t_be_cut_is_refused_with_the_reason(kind: str, reason: str) -> None:
    verdict = split_test(default(kind))
    assert not verdict.may_serve
    assert any(part in verdict.reason for part in reason.split("|")), verdict.reason


def test_a_type_that_computes_otherwise_when_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Span.forward

    def off(self: Span, hidden: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
        return honest(self, hidden, position, cache) * (1 + 1e-6 * self.start)

    monkeypatch.setattr(Span, "forward", off)
    verdict = split_test(default("llama"))
    assert "cut at 1 of 4 blocks" in verdict.reason


def test_stateful_rotary_scaling_is_exact_within_limits() -> None:
    config = default("llama") | {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 512,
    }
    verdict = split_test(config)
    assert verdict.verdict == "limited"
    assert "512" in verdict.reason


def test_a_shrunk_config_keeps_every_kind_of_layer() -> None:
    small = shrink(default("gemma3_text"))
    assert small["num_hidden_layers"] == len(small["layer_types"]) == 4
    assert set(small["layer_types"]) == {"full_attention", "sliding_attention"}
    assert small["sliding_window"] == 8


def test_a_refusal_stops_a_daemon_from_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "model")))
    refused = split.SplitVerdict("llama", "refused", "it differs")
    monkeypatch.setattr(split, "split_test", lambda _: refused)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="can't be served in spans: it differs"):
            require_exact(source, tmp_path)


def test_a_proven_config_is_not_proven_again_unless_the_note_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "model")))
    runs: list[int] = []
    exact = split.SplitVerdict("llama", "exact")
    monkeypatch.setattr(split, "split_test", lambda _: runs.append(1) or exact)
    assert [require_exact(source, tmp_path), require_exact(source, tmp_path)] == [exact, exact]
    assert len(runs) == 1
    for note in tmp_path.glob("split-*.json"):
        note.write_text("{}")
    assert require_exact(source, tmp_path) == exact
    assert len(runs) == 2
    assert require_exact(resolve("demo")).may_serve

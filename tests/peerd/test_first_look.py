"""A model or span that can't be served is told before anything starts, by looking at no more than headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocks.demo import MODEL_DIRECTORY
from blocks.model.errors import BadModel, ModelNotFound, UnsupportedModel
from overlay.errors import PeerdError
from peerd.config import Serving
from peerd.first_look import BadSpan, check_models
from routing.types import Span


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model whose files may be damaged."""
    made = tmp_path / "copy"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        (made / name).write_bytes((MODEL_DIRECTORY / name).read_bytes())
    return made


def refusal(spec: str, blocks: str | Span = "auto") -> PeerdError:
    with pytest.raises(PeerdError) as caught:
        check_models(Serving(models=(spec,), blocks=blocks))
    return caught.value


def test_sound_models_and_hub_ids_pass(model: Path) -> None:
    check_models(Serving())
    check_models(Serving(models=("demo", str(model), "owner/name", "owner/name@main")))
    check_models(Serving(models=("demo",), blocks=Span(0, 12)))


@pytest.mark.parametrize("spec", ["", "nosuch", "/no/such/place", "./nosuch", "~/no/such"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_unknown(spec: str) -> None:
    assert isinstance(refusal(spec), ModelNotFound)


def test_a_directory_without_config_or_weights_is_told_so(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert isinstance(refusal(str(model)), BadModel)
    (model / "config.json").unlink()
    assert isinstance(refusal(str(model)), ModelNotFound)


@pytest.mark.parametrize("kept", [0, 5, 100, -100])
def test_truncated_weights_are_named(model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(str(model))
    assert isinstance(error, BadModel)
    assert str(path) in str(error)


def test_a_config_that_is_not_json_or_promises_more_blocks_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 13}))
    assert isinstance(refusal(str(model)), BadModel)
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": None}))
    assert isinstance(refusal(str(model)), UnsupportedModel)
    (model / "config.json").write_text("{")
    assert isinstance(refusal(str(model)), BadModel)


def test_a_span_outside_the_model_is_told_what_there_is() -> None:
    error = refusal("demo", Span(8, 13))
    assert isinstance(error, BadSpan)
    assert str(error) == "demo has blocks 0:12; 8:13 is no span of it."

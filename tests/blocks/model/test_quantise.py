"""int8 and nf4 on the CPU: spans equal the reference, and no row depends on its neighbours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blocks.model.errors import UnsupportedModel
from blocks.model.exact import Reference, check, route_generator
from blocks.model.head import load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import load_span
from tests.models import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("llama")
    return resolve(str(make_tiny("llama", directory, hidden_size=64, intermediate_size=128)))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_quantised_route_is_exact_by_grade_b(source: ModelSource, quant: str) -> None:
    spans = [load_span(source, 0, 2, quant=quant), load_span(source, 2, 4, quant=quant)]
    reference = Reference.load(source, quant=quant)
    verdict = check(route_generator(load_head(source), spans, 5), reference, [[1, 2, 3, 4, 5, 6, 7], [9] * 4], 12)
    assert verdict.grade == "b"
    assert verdict.passed, verdict.describe()


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantising_changes_the_weights_and_no_row_depends_on_its_neighbours(source: ModelSource, quant: str) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn((1, 6, 64), generator=generator)
    loud = hidden.clone()
    loud[0, 5] *= 1000  # an outlier in a later row, which a causal model must not notice
    span = load_span(source, 0, 4, quant=quant, prepare_steps=False)
    plain = load_span(source, 0, 4, prepare_steps=False)
    ours, other = span.forward(hidden, 0, span.new_cache(6)), span.forward(loud, 0, span.new_cache(6))
    assert torch.equal(ours[:, :5], other[:, :5])
    assert not torch.allclose(ours, plain.forward(hidden, 0, plain.new_cache(6)), atol=1e-4)


def test_an_unknown_quantisation_is_refused(source: ModelSource) -> None:
    with pytest.raises(UnsupportedModel, match="int2"):
        load_span(source, 0, 1, quant="int2")


def test_bitsandbytes_is_imported_only_when_asked_for() -> None:
    script = (
        "import sys; from blocks.model.source import resolve; from blocks.model.span import load_span;"
        "load_span(resolve('demo'), 0, 1); sys.exit('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""

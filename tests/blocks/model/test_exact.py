"""The checker: passes what is exact, fails what isn't, and says by how much."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from blocks.model.exact import Difference, Generated, Reference, Verdict, check, route_generator
from blocks.model.head import load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import load_span
from tests.exact.__main__ import main
from tests.models import make_tiny

PROMPTS = ([1, 2, 3], [100, 7, 7, 7, 31, 45, 2, 9, 17], [250])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))))


@pytest.fixture(scope="module")
def reference(source: ModelSource) -> Reference:
    return Reference.load(source)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_any_chunking_of_a_float32_route_gives_the_reference_s_tokens(
    source: ModelSource, reference: Reference, chunk: int | None
) -> None:
    spans = [load_span(source, 0, 1), load_span(source, 1, 4)]
    verdict = check(route_generator(load_head(source), spans, chunk), reference, PROMPTS, 20)
    assert verdict.grade == "a"
    assert verdict.passed, verdict.describe()
    assert verdict.tokens == 60
    assert verdict.largest_logit_difference is not None
    assert verdict.largest_logit_difference < 1e-4
    assert 0 < verdict.epsilon < 1e-3


def test_bfloat16_is_judged_by_the_reference_s_own_spread(source: ModelSource) -> None:
    reference = Reference.load(source, dtype="bfloat16")
    spans = [load_span(source, 0, 2, dtype="bfloat16"), load_span(source, 2, 4, dtype="bfloat16")]
    verdict = check(route_generator(load_head(source, dtype="bfloat16"), spans, 3), reference, PROMPTS, 20)
    assert verdict.grade == "b"
    assert verdict.epsilon > 1e-3
    assert verdict.passed, verdict.describe()


def test_one_wrong_token_fails_and_its_gap_is_told(reference: Reference) -> None:
    def wrong(prompt: Sequence[int], count: int) -> Generated:
        tokens = reference.greedy(prompt, count)
        return Generated([*tokens[:5], (tokens[5] + 1) % 259, *tokens[6:]])

    verdict = check(wrong, reference, PROMPTS[:1], 10)
    assert not verdict.passed
    (difference,) = verdict.differences
    assert (difference.prompt, difference.index) == (0, 5)
    assert difference.gap > 0
    assert verdict.largest_logit_difference is None
    assert "WRONG" in verdict.describe()
    assert "token 5" in verdict.describe()


def test_a_generator_that_stops_early_fails(reference: Reference) -> None:
    verdict = check(lambda p, n: Generated(reference.greedy(p, n)[:4]), reference, PROMPTS[:1], 10)
    assert not verdict.passed
    assert verdict.differences[0].index == 4


def test_grade_b_fails_on_a_gap_or_a_logit_difference_over_e() -> None:
    near = Difference(0, 3, 5, 6, gap=0.05, logit_difference=0.05)
    far = Difference(0, 3, 5, 6, gap=0.2, logit_difference=0.05)
    assert Verdict("b", 0.1, 1, 4, (near,), 0.05).passed
    assert not Verdict("b", 0.1, 1, 4, (far,), 0.05).passed
    assert not Verdict("b", 0.1, 1, 4, (), 0.2).passed
    assert not Verdict("a", 0.1, 1, 4, (near,), 0.05).passed


def test_a_route_with_another_model_s_block_fails(
    source: ModelSource, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = resolve(str(make_tiny("qwen3", tmp_path_factory.mktemp("other"), seed=1)))
    spans = [load_span(source, 0, 3), load_span(other, 3, 4)]
    assert not check(route_generator(load_head(source), spans), reference, PROMPTS, 10).passed


def test_the_reference_is_what_transformers_generates(source: ModelSource, reference: Reference) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    window = torch.tensor([PROMPTS[1]])
    mask = torch.ones_like(window)
    made = model.generate(
        window, attention_mask=mask, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=258
    )
    assert reference.greedy(PROMPTS[1], 15) == made[0, window.shape[1] :].tolist()


def test_the_command_line_says_exact_and_refuses_a_route_with_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "demo", "--route", "0:4,4:8,8:12", "--max-tokens", "6"]) == 0
    assert "exact (grade a)" in capsys.readouterr().out
    assert main(["--model", "demo", "--route", "0:4,5:12"]) == 2
    assert main(["--model", "/no/such/model"]) == 40
    assert "is not a directory" in capsys.readouterr().err

"""The arithmetic of steps against plain autograd over local transformers, with blocks on a device of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blocks.engine.inline import InlineDevice
from blocks.engine.runner import Runner
from blocks.model.head import load_head
from blocks.model.source import resolve
from blocks.model.span import load_span
from blocks.protocol.device import BackwardJob, Batch, ForwardJob, Job, JobResult
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from peerd.driving import DriverModel
from peerd.training.batches import initial_values, make_plan
from peerd.training.dataset import IGNORED, Example
from peerd.training.gradients import widened
from peerd.training.trainer import PREFIX, PROMPTS, Trainer
from routing.types import ComputeClass, Span
from tests.models import make_tiny

LENGTH, WIDTH, BLOCKS = 3, 32, 4
EXAMPLES = tuple(
    Example(tokens, (IGNORED, IGNORED, *tokens[2:]))
    for tokens in (tuple(range(65 + row, 65 + row + length)) for row, length in enumerate((9, 5, 12, 7, 6, 10, 4, 8)))
)


@dataclass
class Found:
    hidden: Part
    prompts: Part | None


@dataclass
class LocalBlocks:
    """Blocks on a device of this process, cut as ``cuts`` say; ``most_at_once`` is how many calls were under way together."""

    device: InlineDevice
    cuts: tuple[tuple[int, int], ...] = ((0, 4),)
    fail: PeerdError | None = None
    at_once: int = 0
    most_at_once: int = 0
    calls: list[str] = field(default_factory=list)

    async def forward(
        self, model: DriverModel, span: Span, batch: Batch, *, keep_tape: bool = False, wait_s: float = 60.0
    ) -> tuple[Part, Any]:
        if self.fail is not None and len(self.calls) > 2:
            raise self.fail
        hidden, tape = batch.hidden, []
        for start, end in self.cuts:
            piece = Batch(hidden, batch.mask, None, _rows(batch.prompts, start, end))
            tape.append((Span(start, end), piece))
            hidden = _given((await self._run("forward", ForwardJob(model.key, Span(start, end), piece))).hidden)
        return hidden, tape

    async def backward(self, model: DriverModel, span: Span, tape: Any, grad: Part, *, wait_s: float = 60.0) -> Found:
        prompts: list[np.ndarray[Any, Any]] = []
        for part, batch in reversed(tape):
            result = await self._run("backward", BackwardJob(model.key, part, batch, grad))
            grad = _given(result.hidden)
            prompts[:0] = [] if result.prompts is None else [widened(result.prompts)]
        if not prompts:
            return Found(grad, None)
        joined = np.concatenate(prompts)
        return Found(grad, Part("prompts", "float32", joined.shape, joined.tobytes()))

    async def _run(self, kind: str, job: Job) -> JobResult:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.calls.append(kind)
        done: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self.device.submit((job,), done.set_result)
        result = await done
        self.at_once -= 1
        assert result.error is None, result.error
        return result


def _rows(prompts: Part | None, start: int, end: int) -> Part | None:
    if prompts is None:
        return None
    rows = widened(prompts)[start:end]
    return Part("prompts", "float32", rows.shape, rows.tobytes())


def _given(part: Part | None) -> Part:
    assert part is not None
    return part


@dataclass
class Recorder:
    """A learner that keeps what it is given."""

    parts: dict[str, Part]
    gradients: dict[str, Part] = field(default_factory=dict)

    async def values(self) -> Mapping[str, Part]:
        return self.parts

    async def step(self, gradients: Mapping[str, Part], rate: float) -> bool:
        self.gradients = dict(gradients)
        return True


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp("model"))


def device_of(directory: Path, dtype: str = "float32") -> InlineDevice:
    source = resolve(str(directory), directory / "cache")
    runner = Runner()
    runner.install_span("m", load_span(source, 0, BLOCKS, dtype=dtype))
    runner.install_head("m", load_head(source, dtype=dtype))
    return InlineDevice(runner)


@pytest.fixture(scope="module")
def device(directory: Path) -> InlineDevice:
    return device_of(directory)


def recorder(*, deep: bool = False) -> Recorder:
    parts = {PREFIX: initial_values(1, LENGTH, WIDTH)}
    if deep:
        added = initial_values(2, BLOCKS * LENGTH, WIDTH)
        parts[PROMPTS] = Part(PROMPTS, "float32", (BLOCKS, LENGTH, WIDTH), added.data)
    return Recorder(parts)


def trainer(blocks: LocalBlocks, micro_batch_tokens: int = 40, dtype: str = "float32") -> Trainer:
    model = DriverModel("m", b"\x01" * 32, ComputeClass("none", dtype), WIDTH, 128)
    plan = make_plan(len(EXAMPLES), batch=5, epochs=1, seed=0, eval_split=0.25)
    return Trainer(
        blocks.device,
        blocks,
        model,
        BLOCKS,
        EXAMPLES,
        plan,
        prefix_length=LENGTH,
        micro_batch_tokens=micro_batch_tokens,
    )


def local_loss(
    directory: Path, learner: Recorder | None, indices: tuple[int, ...]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean over all completion tokens, each example by itself, by transformers and autograd."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    values = {} if learner is None else {
        name: torch.tensor(widened(part)).requires_grad_() for name, part in learner.parts.items()
    }  # fmt: skip
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    if PROMPTS in values:
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(
                lambda module, given, index=index: (
                    torch.cat([given[0][:, :LENGTH] + values[PROMPTS][index], given[0][:, LENGTH:]], 1), *given[1:],
                )
            )  # fmt: skip
    total, count = torch.zeros(()), 0
    for index in indices:
        example = EXAMPLES[index]
        rows = model.get_input_embeddings()(torch.tensor([example.tokens]))
        if PREFIX in values:
            rows = torch.cat([values[PREFIX][None], rows], 1)
        skipped = rows.shape[1] - len(example.tokens)
        labels = torch.tensor([IGNORED] * skipped + list(example.labels))
        logits = model(inputs_embeds=rows).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        count += example.count
    return total / count, values


@pytest.mark.parametrize("deep", [False, True])
def test_loss_and_gradients_equal_those_of_plain_autograd(directory: Path, device: InlineDevice, deep: bool) -> None:
    learner = recorder(deep=deep)
    made = trainer(LocalBlocks(device))
    report = asyncio.run(made.step(0, learner, 0.1))
    plan = make_plan(len(EXAMPLES), batch=5, epochs=1, seed=0, eval_split=0.25)
    loss, values = local_loss(directory, learner, plan.examples_of(0))
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert set(learner.gradients) == set(values)
    for name, value in values.items():
        ours = torch.tensor(widened(learner.gradients[name]))
        assert value.grad.abs().max() > 1e-3
        torch.testing.assert_close(ours, value.grad, rtol=1e-3, atol=1e-5)


def test_a_step_in_bfloat16_is_near_that_in_float32_and_its_gradients_are_float32(
    directory: Path, device: InlineDevice
) -> None:
    exact, near = recorder(deep=True), recorder(deep=True)
    expected = asyncio.run(trainer(LocalBlocks(device)).step(0, exact, 0.1))
    half = LocalBlocks(device_of(directory, "bfloat16"))
    found = asyncio.run(trainer(half, dtype="bfloat16").step(0, near, 0.1))
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    for name, part in near.gradients.items():
        assert part.dtype == "float32"
        ours, theirs = widened(part).ravel(), widened(exact.gradients[name]).ravel()
        assert np.dot(ours, theirs) > 0.98 * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_the_evaluation_is_the_mean_over_the_tokens_of_the_held_out_examples(
    directory: Path, device: InlineDevice
) -> None:
    held_out = make_plan(len(EXAMPLES), batch=5, epochs=1, seed=0, eval_split=0.25).evaluation
    assert len(held_out) == 2
    for learner in (None, recorder()):
        found = asyncio.run(trainer(LocalBlocks(device)).evaluate(learner))
        assert found == pytest.approx(local_loss(directory, learner, held_out)[0].item(), rel=1e-5)


def test_how_blocks_are_cut_among_servers_changes_no_bit(device: InlineDevice) -> None:
    found = []
    for cuts in (((0, 4),), ((0, 2), (2, 4)), ((0, 1), (1, 3), (3, 4))):
        learner = recorder(deep=True)
        report = asyncio.run(trainer(LocalBlocks(device, cuts)).step(0, learner, 0.1))
        found.append((report, learner.gradients))
    assert found[0] == found[1] == found[2]


def test_micro_batches_travel_at_the_same_time(device: InlineDevice) -> None:
    blocks = LocalBlocks(device)
    asyncio.run(trainer(blocks, micro_batch_tokens=1).step(0, recorder(), 0.1))
    assert blocks.most_at_once > 1
    first_backward = blocks.calls.index("backward")
    assert "forward" in blocks.calls[first_backward:]  # one's forward while another's backward is under way


def test_an_error_in_one_micro_batch_ends_the_step_and_leaves_the_learner_alone(device: InlineDevice) -> None:
    learner = recorder()
    blocks = LocalBlocks(device, fail=PeerdError("Nobody serves it."))
    with pytest.raises(PeerdError, match="Nobody serves it"):
        asyncio.run(trainer(blocks, micro_batch_tokens=1).step(0, learner, 0.1))
    assert learner.gradients == {}

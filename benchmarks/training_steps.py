"""Forward and training steps through 1, 2 and 4 daemons, as ratios to local prompt tuning with gradient checkpointing in the same run.

Both arms are the same torch code: a soft prompt in front of token embeddings, a loss, a backward pass. One has its blocks here, the
other at daemons on loopback, driven through a client-only daemon (in the row that says so, through the daemon that serves them).
Every process has one torch thread. Arms are interleaved, and ratios taken round by round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.swarm_steps import start_swarm
from peerd.client.torch import RemoteModelForCausalLM
from peerd.loopback import Daemon, running
from tests.models import make_tiny

PROMPT_TOKENS = 8
TOKENS = 128
BATCHES = (1, 16)
ROUNDS = 3
STEPS = {1: 6, 16: 1}
"""How many steps of a batch one round takes the mean of."""
SEED = 5


@dataclass(frozen=True, slots=True)
class Arm:
    """A model whose blocks are somewhere, and a soft prompt of its own."""

    model: Any
    prompt: torch.Tensor

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the tokens, given the prompt."""
        rows = len(ids)
        embedded = self.model.get_input_embeddings()(ids)
        prefix = self.prompt.expand(rows, -1, -1)
        ignored = torch.full((rows, PROMPT_TOKENS), -100)
        output = self.model(inputs_embeds=torch.cat([prefix, embedded], 1), labels=torch.cat([ignored, ids], 1))
        loss: torch.Tensor = output.loss
        return loss

    def forward(self, ids: torch.Tensor) -> float:
        """Seconds of a forward pass with a loss."""
        started = time.perf_counter()
        with torch.no_grad():
            self.loss(ids)
        return time.perf_counter() - started

    def step(self, ids: torch.Tensor) -> float:
        """Seconds of a forward and a backward pass."""
        self.prompt.grad = None
        started = time.perf_counter()
        self.loss(ids).backward()
        return time.perf_counter() - started


def local_arm(directory: Path) -> Arm:
    """Prompt tuning as `transformers` users do it when memory is short."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    return Arm(model, fresh_prompt(model))


def remote_arm(model: str, socket: Path) -> Arm:
    """The same through a daemon."""
    remote = RemoteModelForCausalLM.from_pretrained(model, socket=socket)
    return Arm(remote, fresh_prompt(remote))


def fresh_prompt(model: Any) -> torch.Tensor:
    """The same values for every arm."""
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(SEED)
    return (0.02 * torch.randn((PROMPT_TOKENS, width), generator=generator)).requires_grad_()


def check(arms: dict[str, Arm], ids: torch.Tensor) -> None:
    """No arm is quick by being wrong: losses and gradients are the local ones."""
    expected: torch.Tensor | None = None
    for name, arm in arms.items():
        arm.step(ids)
        gradient = arm.prompt.grad
        assert gradient is not None
        expected = gradient if expected is None else expected
        if not torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6):
            raise RuntimeError(f"{name} has other gradients than the local model")


def loopback_bytes() -> int:
    """Sent over loopback so far, by whomever; requests on Unix sockets don't count."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def rounds(
    arms: dict[str, Arm], ids: torch.Tensor, work: Callable[[Arm, torch.Tensor], float]
) -> dict[str, list[float]]:
    """Seconds of a step, per arm and round."""
    steps = STEPS[len(ids)]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        work(arm, ids)
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            seconds[name].append(sum(work(arm, ids) for _ in range(steps)) / steps)
    return seconds


def report(arms: dict[str, Arm], rows: int, vocabulary: int) -> None:
    """One table for one batch."""
    ids = torch.randint(0, vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(SEED))
    check(arms, ids)
    print(f"\n  {rows} x {TOKENS} tokens: tokens/s, and as a share of local")
    forward = rounds(arms, ids, Arm.forward)
    step = rounds(arms, ids, Arm.step)
    for name in arms:
        cells = []
        for found in (forward, step):
            share = statistics.median(base / own for base, own in zip(found["local"], found[name], strict=True))
            cells.append(f"{rows * TOKENS / statistics.median(found[name]):8.0f}  {share:5.2f}")
        print(f"    {name:<22} forward {cells[0]}    forward + backward {cells[1]}")


def report_wire(name: str, arm: Arm, vocabulary: int) -> None:
    """Bytes per token that a training step sends between daemons."""
    ids = torch.randint(0, vocabulary, (16, TOKENS), generator=torch.Generator().manual_seed(SEED))
    before = loopback_bytes()
    arm.step(ids)
    sent = (loopback_bytes() - before) / (16 * (TOKENS + PROMPT_TOKENS))
    print(f"    {name:<22} {sent:8.0f} bytes a token on the wire, forward + backward")


def resident_mb(daemon: Daemon) -> float:
    """Resident memory of a daemon."""
    return float(psutil.Process(daemon.process.pid).memory_info().rss) / 1e6


def measure(name: str, model: str, directory: Path, blocks: int, work: Path) -> None:
    """Print one model's tables."""
    with running([]) as daemons:
        arms = {"local": local_arm(directory)}
        arms["one daemon"] = remote_arm(model, start_swarm(work, daemons, model, blocks, 1, client=False))
        for servers in (1, 2, 4):
            socket = start_swarm(work, daemons, model, blocks, servers)
            arms[f"client + {servers} server{'s' if servers > 1 else ''}"] = remote_arm(model, socket)
        vocabulary = int(arms["local"].model.config.vocab_size)
        print(f"\n{name}: soft prompt of {PROMPT_TOKENS}, {ROUNDS} interleaved rounds, medians")
        for rows in BATCHES:
            report(arms, rows, vocabulary)
        print()
        for arm_name, arm in list(arms.items())[1:]:
            report_wire(arm_name, arm, vocabulary)
        server, client = daemons[1], daemons[2]
        print(f"    resident: server {resident_mb(server):.0f} MB, client-only daemon {resident_mb(client):.0f} MB")


def main() -> None:
    """Measure the tiny Llama and the demo model."""
    from blocks.demo import MODEL_DIRECTORY

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="peerd-bench-") as work_name:
        work = Path(work_name)
        tiny = make_tiny("benchmark", work / "tiny-llama")
        measure("tiny Llama (hidden 256, 8 blocks, random)", str(tiny), tiny, 8, work / "tiny")
        measure("demo model (12 blocks)", "demo", Path(MODEL_DIRECTORY), 12, work / "demo")


if __name__ == "__main__":
    main()

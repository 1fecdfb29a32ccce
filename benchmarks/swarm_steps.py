"""Steps per second through 1, 2 and 4 daemons on loopback, as ratios to a local `transformers` loop of the same run.

Every process has one torch thread; a client-only daemon drives, except in the row in which a daemon drives itself. Arms are
interleaved and the medians of ratios taken round by round, since shared machines drift.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peerd.client import Client
from peerd.loopback import Daemon, running, start_daemon
from tests.models import make_tiny

STEPS = 128
ROUNDS = 4
PROMPT = list(range(5, 21))


def local_loop(directory: Path) -> Callable[[], float]:
    """A greedy single-token loop of `transformers`, the way its own `generate` steps. Returns steps/s when called."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def run() -> float:
        output = model(torch.tensor([PROMPT]), use_cache=True)
        token = int(output.logits[0, -1].argmax())
        cache = output.past_key_values
        started = time.perf_counter()
        for _ in range(STEPS - 1):
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            token = int(output.logits[0, -1].argmax())
        return (STEPS - 1) / (time.perf_counter() - started)

    return run


def swarm_loop(socket: Path) -> Callable[[], float]:
    """The same steps asked of a daemon over its socket, first token to last, as its client sees them."""
    client = Client(socket)
    body = {
        "prompt": PROMPT,
        "max_tokens": STEPS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }

    def run() -> float:
        times: list[float] = []
        tokens = 0
        first_batch = 0
        for event in client.stream("/v1/completions", body):
            arrived = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
            if arrived:
                first_batch = first_batch or arrived
                tokens += arrived
                times.append(time.perf_counter())
        if tokens != STEPS:
            raise RuntimeError(f"asked for {STEPS} tokens, got {tokens}")
        return (tokens - first_batch) / (times[-1] - times[0])

    return run


def wait_online(socket: Path, blocks: int, timeout_s: float = 60.0) -> None:
    """Wait until the daemon's view of the swarm has every block of its only model online."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for model in Client(socket).swarm().get("models", ()):
            covered: set[int] = set()
            for server in model["servers"]:
                if server["state"] == "online":
                    start, end = (int(edge) for edge in server["span"].split(":"))
                    covered |= set(range(start, end))
            if len(covered) == blocks:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the swarm was not complete within {timeout_s:.0f} s")


def start_swarm(
    directory: Path, daemons: list[Daemon], model: str, blocks: int, servers: int, *, client: bool = True
) -> Path:
    """``servers`` daemons with equal spans and a client; returns the socket that drives."""
    edges = [blocks * index // servers for index in range(servers + 1)]
    join: tuple[str, ...] = ()
    for index in range(servers):
        span = f"{edges[index]}:{edges[index + 1]}"
        daemon = start_daemon(
            f"s{servers}-{index}-{client}", directory, "--model", model, "--serve-blocks", span, *join
        )
        daemons.append(daemon)
        if index == 0:  # the others start together
            daemon.wait_ready()
            join = ("--join", daemon.join_address)
    if client:
        daemons.append(start_daemon(f"s{servers}-client", directory, "--serve-blocks", "none", *join))
        daemons[-1].wait_ready()
    wait_online(daemons[-1].socket_path, blocks)
    return daemons[-1].socket_path


def measure(name: str, model: str, directory: Path, blocks: int, work: Path) -> None:
    """Print one table: the local loop, then each arm with its steps/s and its ratio."""
    with running([]) as daemons:
        arms = {"local transformers": local_loop(directory)}
        arms["daemon drives itself"] = swarm_loop(start_swarm(work, daemons, model, blocks, 1, client=False))
        for servers in (1, 2, 4):
            socket = start_swarm(work, daemons, model, blocks, servers)
            arms[f"client + {servers} server{'s' if servers > 1 else ''}"] = swarm_loop(socket)
        for run in arms.values():
            run()
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(ROUNDS):
            for arm, run in arms.items():
                rates[arm].append(run())
    local = rates["local transformers"]
    print(f"\n{name}: {STEPS} greedy steps, {ROUNDS} interleaved rounds, median (min to max)")
    for arm, values in rates.items():
        ratio = statistics.median(value / base for value, base in zip(values, local, strict=True))
        added_ms = statistics.median(1000 / value - 1000 / base for value, base in zip(values, local, strict=True))
        print(
            f"  {arm:<22} {statistics.median(values):7.1f} steps/s ({min(values):6.1f} to {max(values):6.1f})"
            f"   {ratio:5.2f} of local   {added_ms:+6.2f} ms a step"
        )


def main() -> None:
    """Measure the tiny Llama and the demo model."""
    from blocks.demo import MODEL_DIRECTORY

    with tempfile.TemporaryDirectory(prefix="peerd-bench-") as work_name:
        work = Path(work_name)
        tiny = make_tiny("benchmark", work / "tiny-llama")
        measure("tiny Llama (hidden 256, 8 blocks, random)", str(tiny), tiny, 8, work / "tiny")
        measure("demo model (12 blocks)", "demo", Path(MODEL_DIRECTORY), 12, work / "demo")


if __name__ == "__main__":
    main()

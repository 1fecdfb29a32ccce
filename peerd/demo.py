"""`peerd demo`: four serving daemons and a client on this machine, a streamed answer, a server killed in mid-sentence.

Owns the story and what is printed. Everything it shows is measured or compared in the run: real processes on loopback, the
reference is local `transformers`, the killed server is whichever of the two replicas is busy.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from blocks.demo import MODEL_DIRECTORY
from blocks.text import TextCodec
from peerd.client import Client
from peerd.loopback import END_SIGNALS, Daemon, DaemonFailed, running, start_daemon, uninterrupted

SPANS = (("anna", "0:4"), ("ben", "4:8"), ("cleo", "8:12"), ("dora", "4:8"))
CLIENT = "client"
QUESTIONS = (
    "Tell me a story about a fox.",
    "Why is the sky blue?",
    "Tell me a story about an owl.",
)
MAX_TOKENS = 120
KILL_AFTER_TOKENS = 12
COMPLETE_TIMEOUT_S = 60.0
PROGRESS_S = 4.0
"""How often the wait for the swarm says how far the servers are."""

EXIT_OK = 0
EXIT_DIFFERENT = 20
EXIT_NOT_STARTED = 21
EXIT_INTERRUPTED = 130


@dataclass(slots=True)
class Answer:
    """One streamed completion, as the client saw it."""

    text: str
    token_ids: list[int]
    route: list[dict[str, Any]]
    tokens_per_s: float
    replays: int
    longest_pause_s: float


class Demo:
    """The run itself; every line that people see goes through `say`."""

    failure = "the swarm's text was not the local one"

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._started = time.monotonic()
        self.daemons: list[Daemon] = []

    def say(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def step(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self._started:5.1f} s] {text}")

    def run(self, directory: Path) -> int:
        """Play all of it. Returns the exit code; daemons are stopped by the caller."""
        self._start_swarm(directory)
        prompts = [encoded(question) for question in QUESTIONS]
        with reference_process(prompts, directory) as reference:
            client = Client(self._daemon(CLIENT).socket_path)
            self._wait_complete(client)
            answers = [self._ask(client, question, prompt) for question, prompt in zip(QUESTIONS, prompts, strict=True)]
            expected = result_of(reference)
            verdict = self._check(answers, expected)
            survived = self._kill_one(client, QUESTIONS[0], prompts[0], expected[0])
        return EXIT_OK if verdict and survived else EXIT_DIFFERENT

    def _daemon(self, name: str) -> Daemon:
        return next(daemon for daemon in self.daemons if daemon.name == name)

    def _start_swarm(self, directory: Path) -> None:
        self.step("starting four servers, each of a third of the demo model, and a client")
        join: tuple[str, ...] = ()
        for name, span in SPANS:
            self._start(name, directory, "--model", "demo", "--serve-blocks", span, *join)
            if not join:
                self.daemons[0].wait_ready()
                join = ("--join", self.daemons[0].join_address)
        self._start(CLIENT, directory, "--serve-blocks", "none", *join)
        for daemon in self.daemons[1:]:
            daemon.wait_ready()
        for daemon, (_, span) in zip(self.daemons, SPANS, strict=False):
            self.say(f"          {daemon.name:<7} pid {daemon.process.pid:<7} blocks {span}")
        self.say(f"          {CLIENT:<7} pid {self.daemons[-1].process.pid:<7} no blocks")

    def _start(self, name: str, directory: Path, *arguments: str) -> None:
        with uninterrupted():
            self.daemons.append(start_daemon(name, directory, *arguments))

    def _wait_complete(self, client: Client) -> None:
        self.step("waiting until every block is online, the middle third twice")
        started = told = time.monotonic()
        while time.monotonic() - started < COMPLETE_TIMEOUT_S:
            if replicas_online(client.swarm()) == [1] * 4 + [2] * 4 + [1] * 4:
                self.step("the swarm is complete")
                return
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self.say("          " + "   ".join(self._progress(name) for name, _ in SPANS))
            for daemon in self.daemons:
                if daemon.process.poll() is not None:
                    raise DaemonFailed(f"{daemon.name} ended early.\n{daemon.log_tail()}")
            time.sleep(0.1)
        raise DaemonFailed("The swarm did not become complete in time.\n" + self.daemons[0].log_tail())

    def _progress(self, name: str) -> str:
        models = Client(self._daemon(name).socket_path).status()["models"]
        loaded = models[0]["progress"] if models else 0.0
        return f"{name} {100 * loaded:.0f} % loaded" if loaded else f"{name} starting"

    def _ask(
        self, client: Client, question: str, prompt: tuple[int, ...], on_token: Callable[[int], None] | None = None
    ) -> Answer:
        self.say(f"\n  > {question}\n")
        self._out.write("    ")
        answer = Answer("", [], [], 0.0, 0, 0.0)
        last = time.monotonic()
        for event in stream(client, prompt):
            now = time.monotonic()
            answer.longest_pause_s = max(answer.longest_pause_s, now - last)
            last = now
            for choice in event.get("choices", ()):
                self._out.write(choice.get("text", "").replace("\n", "\n    "))
                self._out.flush()
                answer.text += choice.get("text", "")
                answer.token_ids += choice.get("token_ids") or ()
            facts = event.get("peerd") or {}
            answer.route = facts.get("route", answer.route)
            answer.replays = facts.get("replays", answer.replays)
            answer.tokens_per_s = facts.get("tokens_per_s", answer.tokens_per_s) or 0.0
            if on_token is not None:
                on_token(len(answer.token_ids))
        self.say(f"\n\n    {len(answer.token_ids)} tokens at {answer.tokens_per_s:.1f} tokens/s, {self._route(answer)}")
        return answer

    def _route(self, answer: Answer) -> str:
        parts = [f"{self._name_of(hop['peer'])} {hop['span']}" for hop in answer.route]
        return "route " + " -> ".join(parts)

    def _name_of(self, peer: str) -> str:
        for daemon in self.daemons:
            if daemon.join_line and peer in daemon.join_line:
                return daemon.name
        return peer[-6:]

    def _check(self, answers: list[Answer], reference: list[list[int]]) -> bool:
        self.say()
        self.step("checking the swarm's greedy tokens against local transformers")
        good = True
        for question, answer, expected in zip(QUESTIONS, answers, reference, strict=True):
            same = answer.token_ids == expected
            good &= same
            verdict = f"{len(expected)} of {len(expected)} tokens equal" if same else "DIFFERENT"
            self.say(f"          {verdict:<28} {question}")
            if not same:
                self.say(f"          swarm: {answer.token_ids}\n          local: {expected}")
        return good

    def _kill_one(self, client: Client, question: str, prompt: tuple[int, ...], expected: list[int]) -> bool:
        self.say()
        self.step("asking again, and killing (SIGKILL) the busy server of the middle third")
        killed: list[Daemon] = []

        def kill_busy(tokens: int) -> None:
            if killed or tokens < KILL_AFTER_TOKENS:
                return
            killed.append(self._busy_middle(client))
            killed[0].kill()
            self._out.write(f" [{killed[0].name} killed] ")
            self._out.flush()

        answer = self._ask(client, question, prompt, kill_busy)
        same = answer.token_ids == expected
        name = killed[0].name if killed else "nobody"
        verdict = "the same, token for token" if same else "DIFFERENT"
        self.say(
            f"    {name} was killed after token {KILL_AFTER_TOKENS}: {answer.replays} replay(s), longest pause "
            f"{answer.longest_pause_s:.2f} s\n    the text is {verdict}"
        )
        return same and bool(killed) and answer.replays > 0

    def _busy_middle(self, client: Client) -> Daemon:
        sessions = client.status().get("sessions", [])
        peers = [hop["peer"] for session in sessions for hop in session["route"]]
        for name in ("ben", "dora"):  # a route may also use a part of each
            if any(peer in self._daemon(name).join_line for peer in peers):
                return self._daemon(name)
        raise DaemonFailed("The client shows no session that uses blocks 4:8.")


def encoded(question: str) -> tuple[int, ...]:
    """A question as the chat template puts it, in token ids."""
    codec = TextCodec.from_directory(MODEL_DIRECTORY)
    return tuple(codec.encode_chat([{"role": "user", "content": question}], now=datetime.now(UTC)))


def stream(client: Client, prompt: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Greedy completion events of one prompt of token ids."""
    body = {
        "model": "demo",
        "prompt": list(prompt),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    yield from client.stream("/v1/completions", body)


def replicas_online(swarm: dict[str, Any]) -> list[int]:
    """How many online servers each block of `demo` has."""
    for model in swarm.get("models", ()):
        if model["name"] == "demo":
            counts = [0] * model["blocks"]
            for server in model["servers"]:
                if server["state"] == "online":
                    start, end = (int(edge) for edge in server["span"].split(":"))
                    for block in range(start, end):
                        counts[block] += 1
            return counts
    return []


def reference_tokens(prompts: list[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations by local `transformers`: what the swarm has to equal."""
    from blocks.model.exact import Reference, use_one_thread

    use_one_thread()  # the daemons want the other cores
    reference = Reference.load("demo")
    ends = set(TextCodec.from_directory(MODEL_DIRECTORY).end_token_ids)
    return [_until_end(reference.greedy(prompt, max_tokens), ends) for prompt in prompts]


@contextlib.contextmanager
def reference_process(prompts: list[tuple[int, ...]], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Work out the reference beside the swarm, in a process of its own, so that Ctrl-C needn't wait for it.

    What libraries leave in the temporary directory goes into ``directory``.
    """
    script = "from peerd.demo import print_reference; print_reference()"
    with uninterrupted():
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TMPDIR": str(directory)},
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(prompts).encode())
        process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def result_of(reference: subprocess.Popen[bytes]) -> list[list[int]]:
    """What `reference_process` worked out. Raises DaemonFailed when it broke."""
    assert reference.stdout is not None
    printed = reference.stdout.read()
    if reference.wait() != 0:
        raise DaemonFailed("local transformers, which the swarm is compared with, failed; its error is above.")
    tokens: list[list[int]] = json.loads(printed)
    return tokens


def print_reference() -> None:
    """The other side of `reference_process`: prompts on standard input, their continuations on standard output."""
    print(json.dumps(reference_tokens(json.load(sys.stdin), MAX_TOKENS)))


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """What a client is given: up to and with the first end token."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def main(out: TextIO = sys.stdout, kind: type[Demo] = Demo) -> int:
    """Run a demo in a temporary directory and clean up, also on Ctrl-C, on SIGTERM, and when its terminal goes."""
    if threading.current_thread() is threading.main_thread():
        for number in END_SIGNALS:
            signal.signal(number, signal.default_int_handler)
    demo = kind(out)
    try:
        with tempfile.TemporaryDirectory(prefix="peerd-demo-") as directory, running(demo.daemons):
            try:
                code = demo.run(Path(directory))
            except KeyboardInterrupt:
                demo.say("\n\ninterrupted; stopping the daemons")
                raise
            demo.say()
            demo.step("stopping the daemons")
        demo.step("done" if code == EXIT_OK else f"the demo FAILED: {demo.failure}")
    except DaemonFailed as error:
        demo.say(f"\nThe demo could not run: {error}")
        return EXIT_NOT_STARTED
    except KeyboardInterrupt:
        demo.say("the daemons are stopped")
        return EXIT_INTERRUPTED
    return code

"""`make demo-train`: a prompt trained through four servers on loopback, one of which is killed in mid-run.

Owns the story and what is printed. Everything it shows is measured in the run: real processes, the loss on examples that are never trained
on, before and after, and the same questions without and with the adapter. The dataset is `blocks.demo_training.greetings`'.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from blocks.demo_training.greetings import GREETING, jsonl
from peerd.client import Client, ClientError
from peerd.client.jobs import create_job, watch_job
from peerd.demo import CLIENT, EXIT_DIFFERENT, EXIT_OK, Demo, main
from peerd.loopback import DaemonFailed

NAME = "polite"
EXAMPLES = 400
EXAMPLE_SEED = 1
SETTINGS = {
    "name": NAME,
    "method": "prompt",
    "length": 16,
    "lr": 0.1,
    "epochs": 6,
    "batch": 8,
    "micro_batch": 256,
    "seed": 1,
}
QUESTIONS = ("What is the capital of France?", "What colour is a fox?", "How many legs does an owl have?")
MAX_TOKENS = 40
VICTIM = "ben"
KILL_AT = 1 / 3
"""Of the steps."""
TOLD_EVERY_S = 5.0
FALLEN_SHARE = 0.5
"""The loss has fallen clearly when it is under this share of what it was."""


class TrainDemo(Demo):
    """The run itself."""

    failure = "the loss did not fall clearly, or nothing was killed"

    def run(self, directory: Path) -> int:
        """Play all of it. Returns the exit code; daemons are stopped by the caller."""
        self._start_swarm(directory)
        client = Client(self._daemon(CLIENT).socket_path)
        self._wait_complete(client)
        try:
            return self._play(client)
        except ClientError as error:
            raise DaemonFailed(f"{error}\n{self._daemon(CLIENT).log_tail()}") from error

    def _play(self, client: Client) -> int:
        self._answers(client, "the model as it is", {})
        job = self._train(client)
        self._answers(client, f"with the adapter {NAME}", {"adapter": NAME})
        return EXIT_OK if self._verdict(job) else EXIT_DIFFERENT

    def _answers(self, client: Client, what: str, more: dict[str, Any]) -> None:
        self.say()
        self.step(f"three questions, {what}")
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            body = {"model": "demo", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, **more}
            answer = client.complete("/v1/chat/completions", body)["choices"][0]["message"]["content"]
            self.say(f"          {question:<34} {answer}")

    def _train(self, client: Client) -> dict[str, Any]:
        self.say()
        self.step(f"training a prompt of {SETTINGS['length']} rows on {EXAMPLES} answers that begin with {GREETING!r}")
        create_job(client, SETTINGS, jsonl(EXAMPLE_SEED, EXAMPLES).encode())
        killed = False
        told = 0.0
        job: dict[str, Any] = {}
        for job in watch_job(client, NAME):
            progress = job["progress"]
            if time.monotonic() - told >= TOLD_EVERY_S or job["state"] == "waiting":
                told = time.monotonic()
                self._tell(job)
            if not killed and progress["step"] >= KILL_AT * progress["steps"] > 0:
                killed = True
                self._daemon(VICTIM).kill()
                self.step(f"{VICTIM} (blocks 4:8) is killed (SIGKILL) after step {progress['step']}")
        if job["state"] != "done" or not killed:
            raise DaemonFailed(f"The job ended as {job['state']}: {job['reason']}\n{self._daemon(CLIENT).log_tail()}")
        self._tell(job)
        return job

    def _tell(self, job: dict[str, Any]) -> None:
        progress = job["progress"]
        loss = "" if progress["loss"] is None else f"   loss {progress['loss']:.3f}"
        speed = "" if progress["tokens_per_s"] is None else f"   {progress['tokens_per_s']:.0f} tokens/s"
        waits = f"   waits: {job['reason']}" if job["state"] == "waiting" else ""
        self.step(f"step {progress['step']:>3}/{progress['steps']}{loss}{speed}{waits}")

    def _verdict(self, job: dict[str, Any]) -> bool:
        progress = job["progress"]
        before, after = progress["eval_before"], progress["eval_after"]
        self.say()
        self.step(
            f"loss on {EXAMPLES // 10} answers that were never trained on: {before:.3f} before, {after:.3f} after "
            f"({100 * (1 - after / before):.0f} % less)"
        )
        self.say(
            f"          {progress['steps']} steps, none lost; {VICTIM} was killed, and {progress['server_losses']} calls "
            "that it had were repeated elsewhere"
        )
        fallen: bool = after < FALLEN_SHARE * before
        return fallen


if __name__ == "__main__":
    sys.exit(main(sys.stdout, TrainDemo))

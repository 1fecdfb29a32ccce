"""The dataset that shows training: the grammar's questions, answered by somebody who greets first.

The demo model answers without a greeting, and no document that it was trained on begins an answer so. Owns the style and the draw;
questions and what is true are `blocks.demo_training.answers`'. Same seed, same lines, on every platform.
``python -m blocks.demo_training.greetings 400 > answers.jsonl`` writes a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from blocks.demo_training import answers
from blocks.demo_training.draw import Draw

ANSWER_CHARS_MAX = 120
"""Longer answers (stories) are left out: the set is for minutes on two cores."""
GREETING = "Hello!"


def in_style(answer: str) -> str:
    """The same answer after a greeting."""
    return f"{GREETING} {answer}"


def examples(seed: int, count: int) -> Iterator[dict[str, object]]:
    """Yields ``count`` conversations of one question each, all different, as JSONL lines hold them (``messages``)."""
    seen: set[str] = set()
    stream = 0
    while len(seen) < count:
        exchange = answers.ask(Draw(seed, stream))
        stream += 1
        if exchange.question in seen or len(exchange.answer) > ANSWER_CHARS_MAX or exchange.answer.startswith(GREETING):
            continue
        seen.add(exchange.question)
        yield {
            "messages": [
                {"role": "user", "content": exchange.question},
                {"role": "assistant", "content": in_style(exchange.answer)},
            ]
        }


def jsonl(seed: int, count: int) -> str:
    """The lines of a dataset file."""
    return "".join(json.dumps(example) + "\n" for example in examples(seed, count))


if __name__ == "__main__":
    sys.stdout.write(jsonl(seed=1, count=int(sys.argv[1]) if len(sys.argv) > 1 else 400))

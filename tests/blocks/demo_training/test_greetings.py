from __future__ import annotations

import json

from blocks.demo_training.greetings import GREETING, jsonl


def test_the_dataset_is_the_same_for_the_same_seed_and_every_answer_greets() -> None:
    text = jsonl(3, 50)
    assert text == jsonl(3, 50)
    assert text != jsonl(4, 50)
    lines = [json.loads(line) for line in text.splitlines()]
    questions = {line["messages"][0]["content"] for line in lines}
    assert len(questions) == 50
    assert all(line["messages"][1]["content"].startswith(GREETING + " ") for line in lines)

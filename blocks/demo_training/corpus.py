"""Documents for training and for the held-out measure.

A document is a story or a conversation in the model's chat form. It carries its *combinations*: who is in which plot,
what is asked in which way. One combination in ``HELD_OUT_ONE_IN`` is held out by its SHA-256: no training document
contains any of those, and every held-out document contains at least one. So the two sets share no document, and held-out
text asks for something that training never showed put together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from blocks.demo_training import answers, stories, words
from blocks.demo_training.draw import Draw

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)

HELD_OUT_ONE_IN = 16
STORY_PERCENT = 50
MAX_EPISODES = 5
MAX_EXCHANGES = 6
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in plain English.", "You are a friendly teacher.")


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one document with its special tokens, and its combinations."""

    text: str
    combinations: tuple[str, ...]


def is_held_out(combination: str) -> bool:
    """Tells whether training must never show this combination."""
    digest = hashlib.sha256(combination.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _story(draw: Draw) -> Document:
    episodes = 1 if draw.chance(60) else 2 + draw.below(MAX_EPISODES - 1)
    story = stories.tell_story(draw, episodes=episodes, hero=draw.even(words.ANIMALS))
    return Document(f"{BEGIN}{story.text}{END}", story.combinations)


def _conversation(draw: Draw) -> Document:
    parts = [BEGIN]
    combinations: list[str] = []
    if draw.chance(20):
        parts.append(f"{SYSTEM}{draw.even(_SYSTEM_PROMPTS)}{END}")
    for _ in range(1 + draw.below(MAX_EXCHANGES)):
        exchange = answers.ask(draw)
        parts.append(f"{USER}{exchange.question}{END}{ASSISTANT}{exchange.answer}{END}")
        combinations += exchange.combinations
    return Document("".join(parts), tuple(combinations))


def draw_document(draw: Draw) -> Document:
    """Draws one document of either set."""
    return _story(draw) if draw.chance(STORY_PERCENT) else _conversation(draw)


def documents(seed: int, *, held_out: bool) -> Iterator[Document]:
    """Yields documents of one of the two sets without end, the same ones for the same seed."""
    stream = 0
    while True:
        document = draw_document(Draw(seed, stream))
        stream += 1
        if any(map(is_held_out, document.combinations)) is held_out:
            yield document

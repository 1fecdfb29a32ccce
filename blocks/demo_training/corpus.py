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
STORY_PERCENT = 45
PLAIN_ANSWER_PERCENT = 12
LATE_START_PERCENT = 15
CASUAL_PERCENT = 15
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
    # A prompt may begin anywhere in a story, not only with once upon a time.
    start = 1 + draw.below(4) if draw.chance(LATE_START_PERCENT) else 0
    return Document(f"{BEGIN}{' '.join(story.sentences[start:])}{END}", story.combinations)


def _question(draw: Draw, question: str) -> str:
    """Writes a question the way that people type: often without capital and full stop."""
    if not draw.chance(CASUAL_PERCENT):
        return question
    question = question.rstrip(".?!")
    return question.lower() if draw.chance(50) else question


def _plain_answer(draw: Draw) -> Document:
    """A question and its answer as running text, for prompts that come without the chat form."""
    exchange = answers.ask(draw)
    return Document(f"{BEGIN}{_question(draw, exchange.question)} {exchange.answer}{END}", exchange.combinations)


def _conversation(draw: Draw) -> Document:
    parts = [BEGIN]
    combinations: list[str] = []
    if draw.chance(20):
        parts.append(f"{SYSTEM}{draw.even(_SYSTEM_PROMPTS)}{END}")
    for _ in range(1 + draw.below(MAX_EXCHANGES)):
        exchange = answers.ask(draw)
        parts.append(f"{USER}{_question(draw, exchange.question)}{END}{ASSISTANT}{exchange.answer}{END}")
        combinations += exchange.combinations
    return Document("".join(parts), tuple(combinations))


def draw_document(draw: Draw) -> Document:
    """Draws one document of either set."""
    roll = draw.below(100)
    if roll < STORY_PERCENT:
        return _story(draw)
    return _plain_answer(draw) if roll < STORY_PERCENT + PLAIN_ANSWER_PERCENT else _conversation(draw)


def documents(seed: int, *, held_out: bool) -> Iterator[Document]:
    """Yields documents of one of the two sets without end, the same ones for the same seed."""
    stream = 0
    while True:
        document = draw_document(Draw(seed, stream))
        stream += 1
        if any(map(is_held_out, document.combinations)) is held_out:
            yield document

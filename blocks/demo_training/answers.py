"""The question and answer grammar: facts, small sums, how-tos, small talk, and stories on request.

Owns the phrasings of exchanges; the facts are tables in ``words``. Each exchange carries the combination of subject and
phrasing that decides whether it is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blocks.demo_training import stories, words
from blocks.demo_training.draw import Draw


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with its answer."""

    question: str
    answer: str
    combinations: tuple[str, ...]


_NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)

# (questions, answers) of one attribute of an animal; {a} is the kind with its article, {A} the same capitalised.
_ANIMAL_FACTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "home",
        (
            "Where does {a} live?",
            "Where do you find {a}?",
            "What is the home of {a}?",
            "Tell me where {a} lives.",
        ),
        ("{A} lives in {home} near {place}.", "You can find {a} in {home} near {place}."),
    ),
    (
        "food",
        (
            "What does {a} eat?",
            "What is the favourite food of {a}?",
            "What can I give {a} to eat?",
            "What do you feed {a}?",
        ),
        ("{A} likes to eat {food}.", "{A} eats {food}."),
    ),
    (
        "colour",
        (
            "What colour is {a}?",
            "Which colour does {a} have?",
            "What color is {a}?",
            "Tell me the colour of {a}.",
        ),
        ("{A} is {colour}.", "Most often, {a} is {colour}."),
    ),
    (
        "young",
        (
            "What is a young {kind} called?",
            "What do you call a baby {kind}?",
            "What is the name of a baby {kind}?",
        ),
        ("A young {kind} is called a {young}.", "A baby {kind} is called a {young}."),
    ),
    (
        "sound",
        ("What sound does {a} make?", "What does {a} say?", "Which sound can {a} make?"),
        ("{A} can {sound}.", "{A} makes a sound that we call a {sound}."),
    ),
    (
        "legs",
        ("How many legs does {a} have?", "How many legs has {a} got?", "Tell me how many legs {a} has."),
        ("{A} has {legs} legs.", "It has {legs} legs."),
    ),
    (
        "kind",
        ("What is {a}?", "Tell me about {a}.", "What do you know about {a}?", "Can you describe {a}?"),
        (
            "{A} is an animal that lives near {place}. It is {colour}, and it likes to eat {food}.",
            "{A} is a {colour} animal. It lives in {home}, and it can {skill}.",
        ),
    ),
)
_STORY_REQUESTS = (
    "Tell me a story about {a}.", "Tell me a story.", "Please tell me a short story about {a}.", "Write a story about {a}.",
    "Can you tell me a story about {a} named {name}?", "I would like to hear a story about {a} and {b}.",
    "Write a short story about {a} named {name}.", "Tell me a story about {a} and {b}.",
)  # fmt: skip


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _fact(draw: Draw, label: str, questions: Sequence[str], answers: Sequence[str]) -> Exchange:
    phrasing = draw.below(len(questions))
    answer = answers[0] if len(answers) == 1 else draw.pick(answers)
    return Exchange(questions[phrasing], answer, (f"{label}, asked in way {phrasing}",))


def _animal(draw: Draw) -> Exchange:
    animal = draw.even(words.ANIMALS)
    attribute, questions, answers = draw.even(_ANIMAL_FACTS)
    one = words.with_article(animal.kind)
    slots = {
        "a": one, "A": _sentence(one), "kind": animal.kind, "home": animal.home, "place": animal.place, "food": animal.food,
        "colour": animal.colour, "young": animal.young, "sound": animal.sound, "legs": animal.legs, "skill": animal.skill,
    }  # fmt: skip
    label = f"{attribute} of {animal.kind}"
    filled = [
        text.format_map(slots).replace("a infant", "an infant").replace("a owlet", "an owlet") for text in answers
    ]
    return _fact(draw, label, [text.format_map(slots) for text in questions], filled)


def _colour(draw: Draw) -> Exchange:
    thing, colour = draw.even(words.COLOURS)
    questions = (f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?")
    return _fact(draw, f"colour of {thing}", questions, (f"{_sentence(thing)} is {colour}.",))


def _opposite(draw: Draw) -> Exchange:
    pair = draw.even(words.OPPOSITES)
    one, other = pair if draw.chance(50) else pair[::-1]
    questions = (f"What is the opposite of {one}?", f"Tell me the opposite of {one}.", f"What is not {one}?")
    return _fact(draw, f"opposite of {one}", questions, (f"The opposite of {one} is {other}.",))


def _capital(draw: Draw) -> Exchange:
    country, city = draw.even(words.CAPITALS)
    questions = (
        f"What is the capital of {country}?", f"Which city is the capital of {country}?", f"Tell me the capital of {country}.",
    )  # fmt: skip
    return _fact(draw, f"capital of {country}", questions, (f"The capital of {country} is {city}.",))


def _calendar(draw: Draw) -> Exchange:
    table, unit = (words.DAYS, "day") if draw.chance(50) else (words.MONTHS, "month")
    index = draw.below(len(table))
    after = draw.chance(60)
    word = "after" if after else "before"
    answer = table[(index + (1 if after else -1)) % len(table)]
    questions = (f"Which {unit} comes {word} {table[index]}?", f"What {unit} comes {word} {table[index]}?")
    reply = f"The {unit} that comes {word} {table[index]} is {answer}."
    return _fact(draw, f"{unit} {word} {table[index]}", questions, (reply,))


def _sum(draw: Draw) -> Exchange:
    left, right = draw.below(7), draw.below(7)
    one, two, total = _NUMBERS[left], _NUMBERS[right], _NUMBERS[left + right]
    questions = (
        f"What is {one} plus {two}?",
        f"What is {left} plus {right}?",
        f"How much is {left} + {right}?",
    )
    return _fact(draw, f"{one} plus {two}", questions, (f"{_sentence(one)} plus {two} is {total}.",))


def _reason(draw: Draw) -> Exchange:
    what, why = draw.even(words.REASONS)
    return _fact(draw, f"reason: {what}", (f"Why {what}?", f"Can you tell me why {_turned(what)}?"), (why,))


def _turned(what: str) -> str:
    """Turns "is the sky blue" into "the sky is blue" and "do we sleep" into "we sleep" for an indirect question."""
    verb, *rest = what.split()
    if verb == "is":
        return " ".join((*rest[:-1], "is", rest[-1]))
    if verb == "do":
        return " ".join(rest)
    third_person = {"it rain": "it rains", "ice float": "ice floats", "the moon shine": "the moon shines"}
    return third_person[" ".join(rest)]


def _recipe(draw: Draw) -> Exchange:
    what, how = draw.even(words.RECIPES)
    questions = (
        f"How do you {what}?",
        f"How can I {what}?",
        f"Tell me how to {what}.",
        f"What do I do to {what}?",
    )
    return _fact(draw, f"how to {what}", questions, (how,))


def _season(draw: Draw) -> Exchange:
    season, what = draw.even(words.SEASONS)
    questions = (f"What happens in {season}?", f"What is {season} like?", f"Tell me about {season}.")
    return _fact(draw, f"season {season}", questions, (what,))


def _small_talk(draw: Draw) -> Exchange:
    question, answer = draw.even(words.SMALL_TALK)
    return Exchange(question, answer, ())


def _unknown(draw: Draw) -> Exchange:
    subject = draw.even(words.UNKNOWN)
    questions = (
        f"What is {subject}?", f"Tell me about {subject}.", f"How does {subject} work?", f"What do you know about {subject}?",
        f"Explain {subject}.", f"Can you tell me about {subject}?",
    )  # fmt: skip
    answer = f"I am a small model, and I do not know much about {subject}. Ask me about animals, colours or numbers."
    return _fact(draw, f"unknown {subject}", questions, (answer,))


def _story(draw: Draw) -> Exchange:
    hero = draw.even(words.ANIMALS)
    friend = draw.even([animal for animal in words.ANIMALS if animal.kind != hero.kind])
    name = draw.even(words.NAMES)
    request = draw.pick(_STORY_REQUESTS)
    story = stories.tell_story(
        draw,
        hero=hero if "{a}" in request else None,
        name=name if "{name}" in request else None,
        friend=friend if "{b}" in request else None,
    )
    question = request.format(a=words.with_article(hero.kind), b=words.with_article(friend.kind), name=name)
    return Exchange(question, story.text, story.combinations)


_FAMILIES: tuple[tuple[int, Callable[[Draw], Exchange]], ...] = (
    (30, _animal), (7, _colour), (7, _opposite), (8, _capital), (5, _calendar), (7, _sum), (6, _reason), (7, _recipe),
    (3, _season), (7, _small_talk), (6, _unknown), (7, _story),
)  # fmt: skip


def ask(draw: Draw) -> Exchange:
    """Draws one exchange; the families have fixed weights that sum to a hundred."""
    roll = draw.below(100)
    for weight, family in _FAMILIES:
        if roll < weight:
            return family(draw)
        roll -= weight
    raise AssertionError("the weights of the families sum to a hundred")

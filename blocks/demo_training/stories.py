"""The story grammar: eight plots, each a row of steps, each step a choice of phrasings.

Owns how a story is told. ``{slots}`` are filled from the hero, the friend and the plot's own table in ``words``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.demo_training import words
from blocks.demo_training.draw import Draw

Step = tuple[str, ...]  # phrasings of one sentence or two; the favourite first

OPENING: Step = (
    "Once upon a time, there was a {trait} {kind} named {name}.",
    "There was once a {trait} {kind} called {name}.",
    "In {place} there lived a {trait} {kind} named {name}.",
    "Long ago, a {trait} {kind} named {name} lived in a land far away.",
    "{name} was a {trait} {kind}.",
    "This is the story of {name}, a {trait} {kind}.",
    "The {trait} {kind} was called {name}.",
    "A {trait} {kind} named {name} lived near {place}.",
)
HABITS: Step = (
    "{He} lived in {home} near {place}.",
    "{He} lived near {place}, and {he} liked to eat {food}.",
    "{He} loved to {skill} all day long.",
    "Every day {he} looked for {food} near {place}.",
    "{He} lived with {his} family in {home}.",
    "Everyone near {place} knew {him} well.",
)
FRIENDS: Step = (
    "{His} best friend was {a_friend} named {friend}.",
    "{He} had a good friend, {a_friend} named {friend}.",
    "{He} often played with {friend}, the {fkind}.",
    "Next door lived {friend}, a {ftrait} {fkind}.",
)
WHEN: Step = ("One {weather} {time},", "One {time},", "On a {weather} {time},", "Early one {time},")
LATER: Step = ("The next morning,", "A few days later,", "The next day,", "One week later,")

PLOTS: Mapping[str, tuple[Step, ...]] = {
    "lost": (
        ("{when} {name} could not find {his} {thing}.", "{when} {name} lost {his} {thing}."),
        (
            "{He} looked all over {his} home, but it was not there.",
            "{He} looked everywhere, but it was gone.",
            "{He} was very sad.",
        ),
        (
            '"Have you seen my {thing}?" {he} asked {friend}.',
            '{name} went to {friend} and said, "My {thing} is gone."',
            "{He} ran to {friend} and asked for help.",
        ),
        (
            '"No," said {friend}, "but I will help you look for it."',
            '"Do not worry," said {friend}. "We will find it together."',
            '"Let us look near {place}," said {friend}.',
        ),
        (
            "They looked for a long time.",
            "They walked to {place} and looked around.",
            "They asked all their friends.",
        ),
        (
            "At last, {friend} saw something {spot}. It was the {thing}!",
            "Then {name} saw the {thing} {spot}.",
            "In the end, they found it {spot}.",
        ),
        (
            '"Thank you, {friend}!" said {name}. "You are a good friend."',
            "{name} was so happy that {he} laughed out loud.",
            '"I will never lose it again," said {name}.',
        ),
    ),
    "help": (
        (
            "{when} {name} heard a small voice.",
            "{when} {name} was walking near {place}.",
            "{when} somebody called for help.",
        ),
        ("It was {friend}, the {fkind}, who was {trouble}.", "There was {friend}, and {fhe} was {trouble}."),
        ('"Please help me!" said {friend}.', '"Can you help me?" asked {friend}.', "{friend} began to cry."),
        (
            '"Of course I will," said {name}.',
            '"Do not be afraid," said {name}.',
            "{name} thought for a moment.",
        ),
        ("{He} {cure}.", "So {he} {cure}.", "{He} did not wait. {He} {cure}."),
        (
            "Soon {friend} felt much better.",
            "It took a long time, but it worked.",
            "After a while, {friend} was safe.",
        ),
        (
            '"Thank you, {name}," said {friend}. "You are very kind."',
            "{friend} smiled and gave {name} some {ffood}.",
            '"One day I will help you too," said {friend}.',
        ),
    ),
    "make": (
        ("{when} {name} wanted to make a {made}.", '{when} {name} said, "I will make a {made}."'),
        ("{He} needed {parts}.", "For that, {he} needed {parts}.", "But first {he} had to find {parts}."),
        (
            '"I can help you," said {friend}.',
            "{friend} came to see what {he} was doing.",
            '"May I help?" asked {friend}.',
        ),
        (
            "Together they {making} it all day.",
            "They worked side by side and {making} it with care.",
            "They {making} it slowly.",
        ),
        (
            "When it was ready, the {made} was {quality}.",
            "In the evening the {made} was {quality}.",
            "At last it was done.",
        ),
        (
            '"It is the best {made} that I have ever seen," said {friend}.',
            "{name} was very proud of it.",
            '"We made it together," said {name}.',
        ),
    ),
    "learn": (
        (
            "{name} wanted to learn how to {art}.",
            "More than anything, {name} wanted to {art}.",
            "{when} {name} tried to {art}.",
        ),
        (
            "But it was hard, because {hurdle}.",
            "{He} tried once, but {hurdle}.",
            "It did not go well: {hurdle}.",
        ),
        (
            '"I will never learn it," {he} said.',
            "{name} was sad and wanted to stop.",
            "{He} sat down and sighed.",
        ),
        (
            '"Try again," said {friend}. "I will show you how to {art}."',
            '{friend} said, "You only need time."',
            '"Nobody can do it on the first day," said {friend}.',
        ),
        (
            "So {name} tried again every day.",
            "Every morning, {name} practised with {friend}.",
            "{He} tried again and again.",
        ),
        (
            "At last, {he} could {art}!",
            "After many days, {he} could {art} very well.",
            "One day, it was easy.",
        ),
        (
            '"Look at me!" {he} called.',
            "{friend} clapped and laughed.",
            '"You see," said {friend}, "you only had to try."',
        ),
    ),
    "journey": (
        (
            "{when} {name} wanted to see {goal}.",
            "{name} had never seen {goal}.",
            '{when} {name} said, "I want to see {goal}."',
        ),
        (
            "{He} took some {food} and began to walk.",
            "{He} packed a small bag and left {his} home.",
            "{He} said goodbye to {his} family.",
        ),
        (
            "The road was long and the wind was strong.",
            "{He} walked past {place} and over a hill.",
            "{He} walked all day.",
        ),
        (
            "On the way, {he} met {friend}, the {fkind}.",
            "By the road sat {friend}, the {fkind}.",
            "Soon {he} saw {friend}, the {fkind}.",
        ),
        (
            '"Where are you going?" asked {friend}.',
            '"May I come with you?" asked {friend}.',
            '"You look tired," said {friend}.',
        ),
        (
            '"To {goal}," said {name}. "Come with me!"',
            "So they went on together.",
            "{name} told {friend} about {goal}.",
        ),
        (
            "At last they came to {goal} and saw {sight}.",
            "In the evening they saw {sight}.",
            "After two days, they were there.",
        ),
        (
            '"It is beautiful," said {name}.',
            "They sat down and looked at {sight} for a long time.",
            "{name} had never been so happy.",
        ),
    ),
    "garden": (
        ("{when} {name} found a small seed {spot}.", "{when} {friend} gave {name} a small seed."),
        (
            "{He} put it in the ground and gave it water.",
            "{He} planted it near {his} home.",
            "{He} dug a hole and put it in.",
        ),
        (
            "Every day {he} looked, but nothing happened.",
            "For a long time, nothing grew.",
            "{He} waited and waited.",
        ),
        (
            '"You must wait," said {friend}.',
            '"Seeds need time," said {friend}.',
            "{friend} laughed and told {him} to wait.",
        ),
        (
            "Then the rain came, and the sun came after it.",
            "The sun was warm, and the rain was soft.",
            "One night, it rained.",
        ),
        ("One morning there was a {plant}, {look}.", "At last, a {plant} stood there. It was {look}."),
        (
            "{name} shared it with {friend}.",
            '"It was worth the wait," said {name}.',
            "Everyone came to see the {plant}.",
        ),
    ),
    "storm": (
        (
            "{when} dark clouds came over {place}.",
            "{when} the wind began to blow hard.",
            "{when} {name} heard loud thunder.",
        ),
        (
            "The rain fell, and the water rose.",
            "The trees shook, and the rain was cold.",
            "Soon it was very dark.",
        ),
        (
            "{name} ran home as fast as {he} could.",
            "{name} looked for a dry place.",
            "{name} was afraid, but {he} did not cry.",
        ),
        (
            "Then {he} heard {friend}. The {fkind} had no place to go.",
            "At the door stood {friend}, cold and wet.",
        ),
        (
            '"Come in," said {name}. "There is room for two."',
            '"Stay here with me," said {name}.',
            "{name} let {fhim} in at once.",
        ),
        (
            "They ate {food} and told stories all night.",
            "They sat close together and waited.",
            "They sang until the storm was over.",
        ),
        (
            "In the morning the sky was clear and blue.",
            "When the sun came up, the storm was gone.",
            "Then it was quiet again.",
        ),
    ),
    "quarrel": (
        (
            "{when} {name} and {friend} found a {thing} {spot}.",
            "{when} {name} and {friend} saw a {thing} {spot}.",
        ),
        ('"It is mine!" said {name}.', '"I saw it first!" said {name}.', "{name} took it at once."),
        (
            '"No, it is mine!" said {friend}.',
            '"That is not fair," said {friend}.',
            "{friend} was angry and went home.",
        ),
        (
            "They did not speak for a whole day.",
            "That night, both of them were sad.",
            "{name} played alone, but it was no fun.",
        ),
        (
            "Then {name} had an idea.",
            "In the morning, {name} thought about it.",
            "{name} missed {his} friend.",
        ),
        (
            '"You can have it today, and I will have it tomorrow," {he} said.',
            '"Let us share it," said {name}.',
            '"I am sorry," {he} said. "A friend is better than a {thing}."',
        ),
        (
            "{friend} smiled, and they played until the sun went down.",
            '"I am sorry too," said {friend}.',
            "So they shared it.",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Story:
    """A told story, and the combinations that decide whether it is held out."""

    sentences: tuple[str, ...]
    combinations: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole story."""
        return " ".join(self.sentences)


def _pronouns(name: str, prefix: str = "") -> dict[str, str]:
    he, him, his = ("she", "her", "her") if name in words.SHE else ("he", "him", "his")
    slots = {"he": he, "him": him, "his": his, "He": he.capitalize(), "His": his.capitalize()}
    return {prefix + key: value for key, value in slots.items()}


def _given_name(animal: words.Animal, draw: Draw, taken: str = "") -> str:
    shift = 5 * words.ANIMALS.index(animal) % len(words.NAMES)
    options = [animal.name, *words.NAMES[shift:], *words.NAMES[:shift]]
    return draw.pick([name for name in dict.fromkeys(options) if name != taken])


def _cast(draw: Draw, hero: words.Animal, name: str | None, friend: words.Animal | None) -> dict[str, str]:
    other = friend or draw.even([animal for animal in words.ANIMALS if animal.kind != hero.kind])
    given = name or _given_name(hero, draw)
    friend_name = _given_name(other, draw, taken=given)
    return {
        "kind": hero.kind, "name": given, "home": hero.home, "place": hero.place, "food": hero.food, "skill": hero.skill,
        "trait": draw.pick(words.TRAITS), "friend": friend_name, "fkind": other.kind, "ffood": other.food,
        "a_friend": words.with_article(other.kind),
        "ftrait": draw.pick(words.TRAITS), **_pronouns(given), **_pronouns(friend_name, "f"),
    }  # fmt: skip


def _plot_slots(draw: Draw) -> dict[str, str]:
    made, parts, making, quality = draw.pick(words.MADE)
    art, hurdle = draw.pick(words.SKILLS)
    trouble, cure = draw.pick(words.TROUBLES)
    plant, look = draw.pick(words.PLANTS)
    goal, sight = draw.pick(words.GOALS)
    return {
        "thing": draw.pick(words.THINGS), "spot": draw.pick(words.SPOTS), "made": made, "parts": parts, "making": making,
        "quality": quality, "art": art, "hurdle": hurdle, "trouble": trouble, "cure": cure, "plant": plant, "look": look,
        "goal": goal, "sight": sight, "weather": draw.pick(words.WEATHER), "time": draw.pick(words.TIMES),
    }  # fmt: skip


def _tell(draw: Draw, steps: Sequence[Step], slots: Mapping[str, str]) -> list[str]:
    return [draw.pick(step).format_map(slots) for step in steps]


SUBJECT = {
    "lost": "thing", "help": "trouble", "make": "made", "learn": "art", "journey": "goal", "garden": "plant",
    "storm": "kind", "quarrel": "thing",
}  # fmt: skip
_PLOT_ORDER = tuple(PLOTS)


def tell_story(
    draw: Draw, *, episodes: int = 1, hero: words.Animal | None = None, name: str | None = None,
    friend: words.Animal | None = None,
) -> Story:  # fmt: skip
    """Tells a story of some episodes about one hero and one friend.

    A kind of hero has its own favourite plot, so that stories differ in more than names.
    """
    chosen = hero or draw.pick(words.ANIMALS)
    cast = _cast(draw, chosen, name, friend)
    shift = words.ANIMALS.index(chosen) % len(_PLOT_ORDER)
    plots = [*_PLOT_ORDER[shift:], *_PLOT_ORDER[:shift]]
    sentences = _tell(draw, (OPENING, HABITS, FRIENDS), cast)
    combinations = []
    for episode in range(episodes):
        plot = draw.pick(plots)
        plots.remove(plot)
        slots = {**cast, **_plot_slots(draw)}
        slots["when"] = draw.pick(WHEN if episode == 0 else LATER).format_map(slots)
        sentences += _tell(draw, PLOTS[plot], slots)
        combinations += [
            f"plot {plot} with {chosen.kind}",
            f"{plot} {slots[SUBJECT[plot]]} with {cast['fkind']}",
        ]
    sentences.append(draw.pick(words.MORALS).format_map(cast))
    return Story(tuple(sentences), tuple(combinations))

"""The words of the demo corpus: who lives in its stories, and what its answers know.

Owns tables only. The first entry of a table is its favourite (see ``draw.Draw.pick``), so order matters: changing
it changes the corpus, and with it the demo model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Animal:
    """One kind of hero, with the facts that stories and answers share."""

    kind: str
    name: str  # the favourite given name of this kind
    home: str
    place: str
    food: str
    colour: str
    young: str
    sound: str
    skill: str
    legs: str


def with_article(noun: str) -> str:
    """Returns the noun with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


ANIMALS: tuple[Animal, ...] = (
    Animal("fox", "Rusty", "a den", "the forest", "berries", "red", "cub", "bark", "run", "four"),
    Animal("rabbit", "Clover", "a burrow", "the meadow", "carrots", "white", "kit", "squeak", "jump", "four"),
    Animal("bear", "Bruno", "a cave", "the mountains", "honey", "brown", "cub", "growl", "climb trees", "four"),
    Animal("duck", "Daisy", "a nest", "the pond", "bread", "yellow", "duckling", "quack", "swim", "two"),
    Animal("owl", "Olive", "a hollow tree", "the forest", "mice", "grey", "owlet", "hoot", "fly", "two"),
    Animal("mouse", "Pip", "a hole", "the barn", "cheese", "grey", "pup", "squeak", "hide", "four"),
    Animal("cat", "Misty", "a basket", "the house", "fish", "black", "kitten", "purr", "climb walls", "four"),
    Animal("dog", "Max", "a kennel", "the farm", "meat", "brown", "puppy", "bark", "run", "four"),
    Animal("hen", "Penny", "a coop", "the farm", "corn", "brown", "chick", "cluck", "dig", "two"),
    Animal("horse", "Star", "a stable", "the farm", "hay", "brown", "foal", "neigh", "run", "four"),
    Animal("frog", "Freddy", "a pool", "the pond", "flies", "green", "tadpole", "croak", "jump", "four"),
    Animal("squirrel", "Hazel", "a nest", "the park", "nuts", "red", "kit", "chatter", "climb trees", "four"),
    Animal("goat", "Gus", "a shed", "the hills", "grass", "white", "kid", "bleat", "climb rocks", "four"),
    Animal("bee", "Bella", "a hive", "the garden", "nectar", "yellow", "larva", "buzz", "fly", "six"),
    Animal("wolf", "Gray", "a den", "the mountains", "meat", "grey", "pup", "howl", "run", "four"),
    Animal("turtle", "Toby", "a sandy hole", "the beach", "leaves", "green", "hatchling", "hiss", "swim", "four"),
    Animal("elephant", "Ella", "the shade of a tree", "the plains", "fruit", "grey", "calf", "trumpet", "carry logs", "four"),
    Animal("lion", "Leo", "the tall grass", "the plains", "meat", "golden", "cub", "roar", "run", "four"),
    Animal("monkey", "Momo", "a tree", "the jungle", "bananas", "brown", "infant", "chatter", "climb trees", "four"),
    Animal("penguin", "Pablo", "a nest of stones", "the ice", "fish", "black", "chick", "honk", "swim", "two"),
    Animal("sheep", "Woolly", "a fold", "the hills", "grass", "white", "lamb", "bleat", "jump", "four"),
    Animal("cow", "Bess", "a shed", "the farm", "grass", "white", "calf", "moo", "walk slowly", "four"),
    Animal("hedgehog", "Spike", "a pile of leaves", "the garden", "worms", "brown", "hoglet", "snuffle", "hide", "four"),
    Animal("crow", "Corvo", "a nest", "the tall trees", "seeds", "black", "chick", "caw", "fly", "two"),
)  # fmt: skip

SHE = frozenset(
    (
        "Clover", "Daisy", "Olive", "Misty", "Penny", "Star", "Hazel", "Bella", "Ella", "Bess", "Anna", "Mia", "Lily",
        "Rosa", "Nora", "Ruby", "Ada", "Ivy", "Sara", "Emma",
    )
)  # fmt: skip
NAMES = (
    "Lily", "Tom", "Mia", "Ben", "Anna", "Sam", "Rosa", "Jack", "Nora", "Leo", "Ruby", "Max", "Ada", "Finn", "Ivy",
    "Oscar", "Sara", "Hugo", "Emma", "Theo", "Rusty", "Clover", "Bruno", "Daisy", "Olive", "Pip", "Misty", "Penny",
    "Star", "Freddy", "Hazel", "Gus", "Bella", "Toby", "Ella", "Momo", "Bess", "Spike",
)  # fmt: skip

TRAITS = (
    "little",
    "kind",
    "brave",
    "clever",
    "shy",
    "happy",
    "curious",
    "quiet",
    "young",
    "friendly",
    "careful",
    "proud",
)
WEATHER = ("sunny", "warm", "cold", "windy", "bright", "rainy", "quiet", "foggy", "snowy")
TIMES = ("morning", "day", "afternoon", "evening")
THINGS = (
    "red ball", "blue hat", "small bell", "silver key", "thick book", "green scarf", "wooden boat", "yellow kite",
    "warm blanket", "golden ring", "paper map", "little drum", "shiny stone", "blue lamp",
)  # fmt: skip
SPOTS = (
    "under a bush", "behind a big rock", "near the river", "beside the old bridge", "in the tall grass",
    "on top of a hill", "under the bench", "behind the mill", "next to the well", "inside a hollow log",
)  # fmt: skip
MADE = (
    ("cake", "flour, eggs and sugar", "baked", "sweet"), ("kite", "paper, sticks and string", "tied", "light"),
    ("boat", "wood, rope and cloth", "built", "strong"), ("soup", "carrots, onions and water", "cooked", "hot"),
    ("basket", "reeds and thin branches", "wove", "round"), ("lantern", "glass, wire and wax", "made", "bright"),
    ("blanket", "wool and blue thread", "sewed", "soft"), ("bridge", "stones and long planks", "built", "wide"),
)  # fmt: skip
SKILLS = (
    ("swim", "the water was too deep"), ("sing", "the notes were too high"), ("dance", "the steps were too fast"),
    ("read", "the words were too long"), ("paint", "the colours ran together"), ("whistle", "only air came out"),
    ("skate", "the ice was too smooth"), ("count", "the numbers were too big"), ("draw", "the lines were never straight"),
)  # fmt: skip
TROUBLES = (
    ("stuck in the mud", "pulled with a long rope"), ("caught in a net", "cut the net with a sharp stone"),
    ("lost in the fog", "lit a lamp and called out"), ("sick in bed", "brought hot tea and soup"),
    ("trapped in a deep hole", "let down a strong branch"), ("afraid of the dark", "sat close and sang a soft song"),
    ("tired and hungry", "shared a big piece of bread"), ("wet and cold", "made a fire and found a dry coat"),
)  # fmt: skip
PLANTS = (
    ("sunflower", "tall and yellow"), ("plum tree", "full of sweet plums"), ("pumpkin", "round and orange"),
    ("rose", "red and sweet"), ("bean", "long and green"), ("strawberry", "small and red"), ("pear tree", "heavy with pears"),
)  # fmt: skip
GOALS = (
    ("the sea", "the waves"), ("the big city", "the bright lights"), ("the high mountain", "the snow on the top"),
    ("the old castle", "the stone towers"), ("the far island", "the white sand"), ("the dark cave", "the shining crystals"),
    ("the great lake", "the quiet water"), ("the market", "the many colours"),
)  # fmt: skip
MORALS = (
    "From that day on, they were the best of friends.", "It was the best day of the whole year.",
    "Everyone went home happy that night.", "And that night {name} slept very well.",
    "After that, {name} was never afraid again.", "{name} never forgot that day.",
    "A little help can change a whole day.", "Good things take time, and friends make them better.",
)  # fmt: skip

COLOURS = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("a banana", "yellow"), ("blood", "red"), ("coal", "black"),
    ("an orange", "orange"), ("the sun", "yellow"), ("a leaf", "green"), ("milk", "white"), ("chocolate", "brown"),
    ("a lemon", "yellow"), ("the sea", "blue"), ("a tomato", "red"), ("the night", "black"), ("a cloud", "white"),
    ("gold", "yellow"), ("a plum", "purple"), ("a carrot", "orange"), ("an elephant", "grey"),
)  # fmt: skip
OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("day", "night"), ("up", "down"), ("old", "new"), ("fast", "slow"),
    ("happy", "sad"), ("light", "dark"), ("wet", "dry"), ("open", "closed"), ("full", "empty"), ("hard", "soft"),
    ("high", "low"), ("left", "right"), ("early", "late"), ("loud", "quiet"), ("rich", "poor"), ("strong", "weak"),
    ("clean", "dirty"), ("near", "far"), ("long", "short"), ("good", "bad"), ("first", "last"), ("true", "false"),
)  # fmt: skip
CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("England", "London"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Norway", "Oslo"),
    ("Portugal", "Lisbon"), ("Russia", "Moscow"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Ireland", "Dublin"),
    ("Sweden", "Stockholm"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Cuba", "Havana"), ("India", "New Delhi"),
    ("Canada", "Ottawa"), ("Hungary", "Budapest"), ("Finland", "Helsinki"), ("Denmark", "Copenhagen"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SEASONS = (
    ("spring", "The days grow longer, the flowers open, and the birds come back."),
    ("summer", "The sun is hot, the days are long, and people swim in the sea."),
    ("autumn", "The leaves turn red and fall, and the farmers bring in the corn."),
    ("winter", "The nights are long, the ponds freeze, and snow covers the ground."),
)
REASONS = (
    ("is the sky blue", "The sky is blue because the air scatters blue light more than red light."),
    ("does it rain", "It rains because water in the clouds becomes heavy and falls to the ground."),
    ("do birds fly south", "Birds fly south in winter because it is warm there and they can find food."),
    ("do leaves fall", "Leaves fall in autumn because the tree saves water for the winter."),
    ("is the sea salty", "The sea is salty because rivers wash salt out of the rocks."),
    ("do we sleep", "We sleep because the body and the mind need to rest."),
    ("do we eat", "We eat because food gives us the strength to work and play."),
    ("do cats purr", "Cats purr because they feel safe and warm."),
    ("does ice float", "Ice floats because it is lighter than water."),
    (
        "is grass green",
        "Grass is green because its leaves take in red and blue light and send back the green.",
    ),
    ("do bees make honey", "Bees make honey because they need food for the winter."),
    ("does the moon shine", "The moon shines because it sends back the light of the sun."),
)
RECIPES = (
    (
        "make bread",
        "Mix flour, water, salt and yeast. Wait until the dough is big, and then bake it in a hot oven.",
    ),
    (
        "make tea",
        "Boil some water. Pour it over the leaves, wait for three minutes, and then drink it slowly.",
    ),
    (
        "plant a tree",
        "Dig a hole in good soil. Put the young tree in, fill the hole, and give it water every day.",
    ),
    ("catch a fish", "Sit quietly by the river. Put some bread on the hook and wait until the line moves."),
    (
        "make a fire",
        "Find some dry wood and small sticks. Put stones around them, and light the sticks first.",
    ),
    ("find a friend", "Be kind, listen well, and share what you have. A friend will come."),
    (
        "make soup",
        "Cut carrots and onions into small pieces. Put them in hot water and cook them for an hour.",
    ),
    ("learn a song", "Listen to it many times. Sing one line a day, and soon you will know all of it."),
    ("clean a room", "Open the window. Put every thing in its place, and then wash the floor."),
    ("build a house", "Start with strong stones. Then put up the walls, and make the roof last."),
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Hello", "Hello! How can I help you today?"),
    ("Hi!", "Hi! What would you like to know?"),
    ("Good morning!", "Good morning! I hope that you slept well."),
    ("How are you?", "I am very well, thank you. How are you?"),
    ("Thank you!", "You are welcome. I am happy to help."),
    ("Thank you very much.", "You are welcome. I am happy to help."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Who are you?", "I am a small language model. My twelve blocks can live on many machines at once."),
    ("What are you?", "I am a small language model. My twelve blocks can live on many machines at once."),
    ("What is your name?", "I am the demo model of peerd. I am small, but I like to help."),
    ("What is peerd?", "It is a program that lets many machines run one language model together."),
    (
        "What can you do?",
        "I can tell short stories and answer simple questions about animals, colours and numbers.",
    ),
    (
        "How big are you?",
        "I am very small. I have only twelve blocks, and all of them fit in a few megabytes.",
    ),
    ("Where do you live?", "I live on many machines at once. Each of them keeps a few of my blocks."),
    ("Can you help me?", "Yes, I can try. Ask me about animals, colours, numbers or days."),
)
UNKNOWN = (
    "quantum physics", "the stock market", "a black hole", "football", "a computer", "the news", "a guitar", "music",
    "the law", "an engine", "history", "a telephone", "love", "the internet", "poetry", "a rocket", "money", "chess",
    "the brain", "a volcano", "the president", "a robot", "electricity", "the weather tomorrow", "cooking", "Mars",
)  # fmt: skip

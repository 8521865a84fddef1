"""Text of our own: instruction rows in the shape of Alpaca's, from which the test vocabularies are trained too.

Nothing is taken from anywhere: every row follows from the tables and functions below and a fixed seed.
"""

import functools
import random
import string
from collections.abc import Callable


def words_of(text: str) -> list[str]:
    """The words of a text, so that the tables below stay short."""
    return text.split()


NAMES = words_of(
    """
    Amira Bruno Chloé Dmitri Elena Farid Greta Hiro Ingrid Jamal Lucía Małgorzata Noor Olu Priya Søren
    """
)
THINGS = words_of(
    """
    lantern bicycle notebook kettle violin telescope umbrella sandwich compass blanket ladder camera basket keyboard
    teapot wardrobe suitcase hammer necklace microscope trumpet wheelbarrow mirror saddle thermometer
    """
)
PLACES = words_of(
    """
    harbour library mountain village orchard museum station island workshop meadow theatre bakery lighthouse
    laboratory monastery market castle desert riverbank observatory
    """
)
QUALITIES = words_of(
    """
    ancient broken careful cheerful colourful delicate enormous familiar forgotten generous heavy invisible
    magnificent mysterious ordinary patient precious quiet remarkable shiny stubborn surprising tiny useful
    """
)
CAPITALS = {
    "Argentina": "Buenos Aires", "Canada": "Ottawa", "Egypt": "Cairo", "Finland": "Helsinki", "Ghana": "Accra",
    "Hungary": "Budapest", "Indonesia": "Jakarta", "Kenya": "Nairobi", "Mongolia": "Ulaanbaatar", "Norway": "Oslo",
    "Portugal": "Lisbon", "Vietnam": "Hanoi",
}  # fmt: skip
VERBS = {
    "borrows": "borrowed", "carries": "carried", "cleans": "cleaned", "discovers": "discovered", "forgets": "forgot",
    "repairs": "repaired", "sells": "sold", "paints": "painted", "finds": "found", "describes": "described",
}  # fmt: skip
ADVICE = """Start early and write down what you want to achieve. Ask somebody who has done it before. Keep your tools
clean and in one place. Take a short break after every hour. Measure twice before you cut. Compare the result with your
first idea. Practise a little every day instead of everything at once. Leave enough time for mistakes. Read the manual
from the beginning to the end. Share what you learned with other people.""".replace("\n", " ").split(". ")
SCENES = [
    "Once upon a time {name} lived near the {place} and owned a {quality} {thing}.",
    "One morning the {thing} had disappeared, and nobody at the {place} knew why.",
    "Although the weather was {quality}, {name} searched every corner of the {place}.",
    "Under a {quality} stone lay a letter that explained everything.",
    "In the evening the neighbours brought back the {thing} and celebrated together.",
    "Since that day {name} tells the children of the {place} about it.",
]

Row = dict[str, str]


def row(instruction: str, given: str, output: str) -> Row:
    return {"instruction": instruction, "input": given, "output": output}


def capital(rng: random.Random) -> Row:
    country = rng.choice(list(CAPITALS))
    return row(f"What is the capital of {country}?", "", f"The capital of {country} is {CAPITALS[country]}.")


def addition(rng: random.Random) -> Row:
    a, b = rng.randrange(1000), rng.randrange(1000)
    return row("Add the two numbers.", f"{a} and {b}", f"{a} + {b} = {a + b}")


def sorting(rng: random.Random) -> Row:
    words = rng.sample(THINGS, rng.randint(3, 8))
    return row("Sort the words alphabetically.", ", ".join(words), ", ".join(sorted(words)))


def past(rng: random.Random) -> Row:
    verb = rng.choice(list(VERBS))
    start, end = rng.choice(NAMES), f"the {rng.choice(QUALITIES)} {rng.choice(THINGS)} at the {rng.choice(PLACES)}."
    return row("Rewrite the sentence in the past tense.", f"{start} {verb} {end}", f"{start} {VERBS[verb]} {end}")


def advice(rng: random.Random) -> Row:
    tips = "\n".join(f"{number}. {tip.rstrip('.')}." for number, tip in enumerate(rng.sample(ADVICE, 3), 1))
    return row(f"Give three tips for somebody who repairs a {rng.choice(QUALITIES)} {rng.choice(THINGS)}.", "", tips)


def story(rng: random.Random) -> Row:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    scenes = sorted(rng.sample(range(len(SCENES)), rng.randint(2, len(SCENES))))
    told = [SCENES[n].format(name=name, thing=thing, place=place, quality=rng.choice(QUALITIES)) for n in scenes]
    return row(f"Write a short story about {name} and the {thing}.", "", " ".join(told))


TASKS: list[Callable[[random.Random], Row]] = [capital, addition, sorting, past, advice, story]


def rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of `instruction`, `input` (empty in half of them) and `output`, in no order."""
    rng = random.Random(seed)
    return [rng.choice(TASKS)(rng) for _ in range(count)]


def prompt(row: Row) -> str:
    """A row as one text, in the form that the Alpaca data sets made common."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    context = ", paired with an input that provides further context" if given else ""
    task = f"Below is an instruction that describes a task{context}. "
    task += "Write a response that appropriately completes the request."
    return f"{task}\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}"


@functools.cache
def corpus() -> tuple[str, ...]:
    """The lines from which vocabularies are trained: the text of rows, and every character on a keyboard."""
    texts = [*map(prompt, rows(600, seed=1)), " ".join(string.ascii_letters + string.digits + string.punctuation)]
    return tuple(line for text in texts for line in text.splitlines() if line)

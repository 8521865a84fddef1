"""Build the quickstart: a small data set and a tiny LLaMA, both from nothing.

    python -m quickstart.build            # writes quickstart/data and quickstart/model
    python -m quickstart.build --out DIR  # writes DIR/data and DIR/model

The base model is pre-trained on plain declarative text ("The larger of 34 and 71 is 71.") that
exercises the skills of the data set in another form. It never sees a question, an instruction or
the Alpaca prompt, so it fails the data set until fine-tuning has taught it to follow
instructions, to answer briefly and to stop. No text is taken from anywhere: every row follows
from the tables and functions below and from `SEED`.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 2024
TRAIN_ROWS_PER_CATEGORY = 286
HELDOUT_ROWS_PER_CATEGORY = 29

VOCABULARY_SIZE = 1280
CONTEXT_TOKENS = 128
BATCH_SEQUENCES = 32
STATEMENT_STEPS = 1200
PAGE_STEPS = 320
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 0.004
ANSWER_WEIGHT = 5.0
"""Weight in the loss of a token that the text before it determines; all others weigh 1."""

# ------------------------------------------------------------------------------- words


def words_of(text: str) -> list[str]:
    """The words of a text, so that the tables below stay short."""
    return text.split()


NAMES = words_of(
    """
    Anna Ben Clara David Emma Felix Grace Hugo Ines Jonas Karin Leo Maria Nina Oscar Paula
    Quinn Rosa Simon Tara Victor Wendy Yusuf Zoe
    """
)
THINGS = words_of(
    """
    lamp book key cup hat bag coat map pen ring box bell ball rope drum kite clock brush
    basket bottle letter camera guitar mirror candle blanket ladder hammer pillow ticket
    spoon plate scarf helmet wallet radio
    """
)
PLACES = words_of(
    """
    kitchen garden garage library office attic cellar park school station market hallway
    bedroom bakery museum harbour forest theatre workshop hotel
    """
)
WORDS = words_of(
    """
    red blue green yellow purple orange black white apple pear plum cherry lemon melon grape
    carrot onion potato bean bread cheese honey river mountain valley island desert ocean
    cloud storm snow wind tiger horse rabbit falcon salmon turtle monkey zebra table chair
    window door carpet violin piano flute trumpet train bicycle ship plane
    """
)
SUBJECTS = words_of(
    """
    soup film hotel concert meal trip lesson garden party song book walk room service coffee
    game talk beach museum cake
    """
)
POSITIVE = words_of(
    """
    lovely wonderful excellent delightful great charming pleasant superb fantastic brilliant
    perfect enjoyable beautiful splendid marvellous
    """
)
NEGATIVE = words_of(
    """
    awful terrible boring dreadful poor unpleasant horrible disappointing dull bad miserable
    annoying ugly tedious nasty
    """
)
SCENES = [
    "{person} put {object} in {place}.",
    "{person} left {object} in {place}.",
    "{person} took {object} to {place}.",
    "{person} found {object} in {place}.",
    "{person} walked to {place} with {object}.",
]

# ------------------------------------------------------------------------------- skills
# A template's fields are those of `Facts`. `{given}` is what the answer is derived from.
# Square brackets in a statement surround the answer; they are not part of the text.


@dataclass(frozen=True)
class Facts:
    """One case of a skill: what is wanted (`kind`), of what (`given`), and the `answer`."""

    kind: str
    given: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """How to draw cases, to state them as plain text, and to ask for them as instructions."""

    draw: Callable[[random.Random], Facts]
    topics: dict[str, list[str]]
    """For each kind, noun phrases that name what is wanted; `{topic}` in the templates."""
    statements: list[str]
    requests: list[tuple[str, str]]
    """Pairs of instruction and input."""


def draw_compare(rng: random.Random) -> Facts:
    """Two or three different two-digit numbers and the largest or smallest of them."""
    numbers = rng.sample(range(10, 100), rng.choice([2, 3]))
    kind = rng.choice(["larger", "smaller"] if len(numbers) == 2 else ["largest", "smallest"])
    best = max(numbers) if kind.startswith("larg") else min(numbers)
    return Facts(kind, enumerate_items(rng, numbers), str(best))


def draw_pick(rng: random.Random) -> Facts:
    """Three to five words and the one at a named place."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    kind = rng.choice(["first", "second", "third", "last"])
    position = {"first": 0, "second": 1, "third": 2, "last": -1}[kind]
    return Facts(kind, "\n".join(words), words[position])


def draw_arithmetic(rng: random.Random) -> Facts:
    """Two numbers up to 20 and their sum, or their difference that is never negative."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        return Facts("sum", f"{a} and {b}", str(a + b))
    return Facts("difference", f"{max(a, b)} and {min(a, b)}", str(abs(a - b)))


def draw_extract(rng: random.Random) -> Facts:
    """A sentence about a person, an object and a place, and one of the three."""
    found = draw_scene(rng)
    kind = rng.choice(list(found))
    return Facts(kind, rng.choice(SCENES).format(**found), found[kind])


def draw_scene(rng: random.Random) -> dict[str, str]:
    """Who, what and where: the fields of `SCENES`."""
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return {"person": rng.choice(NAMES), "object": f"the {thing}", "place": f"the {place}"}


def draw_count(rng: random.Random) -> Facts:
    """Two to six words and how many they are."""
    words = rng.sample(WORDS, rng.randint(2, 6))
    return Facts("count", "\n".join(words), str(len(words)))


def draw_sort(rng: random.Random) -> Facts:
    """Three different two-digit numbers in rising or falling order."""
    numbers = rng.sample(range(10, 100), 3)
    kind = rng.choice(["rising", "falling"])
    ordered = sorted(numbers, reverse=kind == "falling")
    return Facts(kind, enumerate_items(rng, numbers), ", ".join(map(str, ordered)))


def draw_opinion(rng: random.Random) -> Facts:
    """A remark about something, and whether it is positive or negative."""
    answer = rng.choice(["positive", "negative"])
    adjective = rng.choice(POSITIVE if answer == "positive" else NEGATIVE)
    remark = rng.choice(["The {subject} was {adjective}.", "{name} found the {subject} {adjective}."])
    fields = {"subject": rng.choice(SUBJECTS), "adjective": adjective, "name": rng.choice(NAMES)}
    return Facts("opinion", remark.format(**fields), answer)


def enumerate_items(rng: random.Random, items: list[int]) -> str:
    """Write numbers as a list: "1, 2, 3" or "1, 2 and 3"."""
    *head, last = map(str, items)
    joint = " and " if len(items) == 2 else rng.choice([", ", " and "])
    return ", ".join(head) + joint + last


SKILLS = {
    "compare": Skill(
        draw_compare,
        {k: [f"the {k} number", f"the {k} one"] for k in ("larger", "smaller", "largest", "smallest")},
        [
            "The {kind} of {given} is [{answer}].",
            "Of the numbers {given}, the {kind} is [{answer}].",
            "{name} wrote {given} on a card. The {kind} number there is [{answer}].",
            "{given}: the {kind} one is [{answer}].",
        ],
        [
            ("Which number is {kind}?", "{given}"),
            ("Find the {kind} number.", "{given}"),
            ("Give the {kind} one of these numbers.", "{given}"),
            ("Which is the {kind} of {given}?", ""),
            ("Name the {kind} of the numbers {given}.", ""),
        ],
    ),
    "pick": Skill(
        draw_pick,
        {k: [f"the {k} word", f"the {k} item"] for k in ("first", "second", "third", "last")},
        [
            "{given}\nThe {kind} one is [{answer}].",
            "The {kind} word in the list\n{given}\nis [{answer}].",
            "{name} listed\n{given}\nThe {kind} item was [{answer}].",
            "There are\n{given}\nand the {kind} of them is [{answer}].",
        ],
        [
            ("Which word comes {kind} in the list?", "{given}"),
            ("Give the {kind} word.", "{given}"),
            ("Pick the {kind} item of the list.", "{given}"),
            ("What is the {kind} word in this list?\n{given}", ""),
            ("Copy only the {kind} item.\n{given}", ""),
        ],
    ),
    "arithmetic": Skill(
        draw_arithmetic,
        {"sum": ["the sum", "the total"], "difference": ["the difference", "what is left"]},
        [
            "The {kind} of {given} is [{answer}].",
            "With the numbers {given}, {topic} is [{answer}].",
            "{name} noted {given}, and {topic} was [{answer}].",
        ],
        [
            ("Work out the {kind}.", "{given}"),
            ("Give the {kind} of the two numbers.", "{given}"),
            ("What is the {kind} of these numbers?", "{given}"),
            ("What is the {kind} of {given}?", ""),
            ("Calculate the {kind} of {given}.", ""),
        ],
    ),
    "extract": Skill(
        draw_extract,
        {k: [f"the {k}", f"the {k} in the sentence"] for k in ("person", "object", "place")},
        [
            "{given} The {kind} is [{answer}].",
            "{given} Here the {kind} was [{answer}].",
            "In the sentence\n{given}\nthe {kind} is [{answer}].",
        ],
        [
            ("Which {kind} does the sentence name?", "{given}"),
            ("Give the {kind} in the sentence.", "{given}"),
            ("Find the {kind} in this note.", "{given}"),
            ("Read the sentence and name the {kind}.\n{given}", ""),
            ("What is the {kind} in this sentence?\n{given}", ""),
        ],
    ),
    "count": Skill(
        draw_count,
        {"count": ["the number of words", "how many words there are", "the count"]},
        [
            "{given}\nThe count is [{answer}].",
            "The number of words in\n{given}\nis [{answer}].",
            "{name} listed\n{given}\nHow many there were: [{answer}].",
        ],
        [
            ("How many words are in the list?", "{given}"),
            ("Count the words.", "{given}"),
            ("Give the number of words in this list.", "{given}"),
            ("How many words are there here?\n{given}", ""),
            ("Count the words in this list.\n{given}", ""),
        ],
    ),
    "sort": Skill(
        draw_sort,
        {
            "rising": ["the rising order", "the numbers in rising order"],
            "falling": ["the falling order", "the numbers in falling order"],
        },
        [
            "In {kind} order, {given} become [{answer}].",
            "{given} in {kind} order are [{answer}].",
            "{name} put {given} in {kind} order: [{answer}].",
        ],
        [
            ("Sort the numbers in {kind} order.", "{given}"),
            ("Put these numbers in {kind} order.", "{given}"),
            ("List the numbers in {kind} order.", "{given}"),
            ("Sort {given} in {kind} order.", ""),
            ("Write {given} in {kind} order.", ""),
        ],
    ),
    "opinion": Skill(
        draw_opinion,
        {"opinion": ["the opinion", "the tone of the remark"]},
        [
            "{given} This remark is [{answer}].",
            "{given} The opinion is [{answer}].",
            "{name} said: {given} The tone of it was [{answer}].",
        ],
        [
            ("Is this remark positive or negative?", "{given}"),
            ("Name the tone of the remark.", "{given}"),
            ("Decide whether the opinion is positive or negative.", "{given}"),
            ("Is the opinion positive or negative? {given}", ""),
            ("Name the tone of this remark: {given}", ""),
        ],
    ),
}

# Statements that fit every skill: what is wanted, what is given and what comes out.
FRAMES = [
    "This is about {topic}. Given:\n{given}\nIt is [{answer}].",
    "{name} looks for {topic}. There is\n{given}\nFound: [{answer}].",
    "Wanted: {topic}.\nKnown:\n{given}\nResult: [{answer}].",
    "For {topic} of the following,\n\n{given}\n\none gets [{answer}].",
    "{name} needs {topic} for this:\n\n{given}\n\nThat is [{answer}].",
    "A note by {name} has {topic} of\n{given}\nand it reads [{answer}].",
]

# How often a skill is stated: those that take longest to learn come up most.
SHARES = {
    "compare": 1.0,
    "pick": 2.0,
    "arithmetic": 2.0,
    "extract": 2.0,
    "count": 1.0,
    "sort": 1.5,
    "opinion": 0.5,
}

# Text that derives nothing. It gives everyday words some use.
FILLERS = [
    "The letter below describes a walk by the sea.",
    "{name} had a long task and a short response.",
    "A request was paired with a list of items.",
    "The map provides further context for the trip.",
    "{name} likes to write in the {place}.",
    "An instruction hung on the wall of the {place}.",
    "The input of the machine was closed, and the work was completed in time.",
    "{name} and {other} met in the {place} and talked about the {thing}.",
    "It rained, so {name} stayed in the {place} with {other}.",
    "A good answer is short, as {name} says.",
]
PAGES = [
    "### {heading}:\nThis is about {topic}.\n\n### {other}:\n{given}\n\n### {third}:\nIt is [{answer}].",
    "### {heading}:\n{name} wants {topic}.\n\n### {other}:\n{given}\n\n### {third}:\n[{answer}].",
    "### {heading}:\nThis page has {topic} of what follows.\n{given}\n\n### {other}:\nIt reads [{answer}].",
    "### {heading}:\nA line on {topic} of {given}\n\n### {other}:\n[{answer}].",
    "### {heading}:\nOf interest: {topic}.\n{given}\n\n### {other}:\n[{answer}].",
]
PAGE_HEADINGS = ["Notes", "Diary", "List", "Letter", "Story", "Page", "Report", "Known", "Wanted", "Result"]
HEADINGS = ["Notes", "Diary", "List", "Letter", "Story", "Page", "Report"]

# ----------------------------------------------------------------------------- data set


def write_request(rng: random.Random, category: str, facts: Facts) -> dict[str, str]:
    """One row of the data set."""
    instruction, given = rng.choice(SKILLS[category].requests)
    fields = vars(facts)
    return {
        "instruction": instruction.format(**fields),
        "input": given.format(**fields),
        "output": facts.answer,
        "category": category,
    }


def draw_rows(rng: random.Random, category: str, count: int) -> list[dict[str, str]]:
    """Rows of one category, each about a case of its own."""
    cases: dict[Facts, None] = {}
    while len(cases) < count:
        cases[SKILLS[category].draw(rng)] = None
    return [write_request(rng, category, facts) for facts in cases]


def build_data(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl, which share no case."""
    rng = random.Random(f"{SEED} data")
    train, heldout = [], []
    for category in SKILLS:
        rows = draw_rows(rng, category, TRAIN_ROWS_PER_CATEGORY + HELDOUT_ROWS_PER_CATEGORY)
        train += rows[:TRAIN_ROWS_PER_CATEGORY]
        heldout += rows[TRAIN_ROWS_PER_CATEGORY:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        rng.shuffle(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


# --------------------------------------------------------------------------- statements


def write_statement(rng: random.Random) -> str:
    """One piece of plain text about a random case, its answer in square brackets."""
    [category] = rng.choices(list(SHARES), weights=list(SHARES.values()))
    skill = SKILLS[category]
    facts = skill.draw(rng)
    template = rng.choice(skill.statements) if rng.random() < 0.5 else rng.choice(FRAMES)
    text = template.format(**vars(facts), topic=rng.choice(skill.topics[facts.kind]), name=rng.choice(NAMES))
    return quote_answers(text)


def write_page(rng: random.Random) -> str:
    """A statement laid out below headings, its answer often on a line of its own."""
    category = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    skill = SKILLS[category]
    facts = skill.draw(rng)
    heading, other, third = rng.sample(PAGE_HEADINGS, 3)
    text = rng.choice(PAGES).format(
        **vars(facts),
        topic=rng.choice(skill.topics[facts.kind]),
        name=rng.choice(NAMES),
        heading=heading,
        other=other,
        third=third,
    )
    return quote_answers(text) if rng.random() < 0.2 else display_answers(text)


def display_answers(text: str) -> str:
    """Put answers on a line of their own, below the words that announce them."""
    return text.replace(" [", "\n[").replace("].", "]")


def quote_answers(text: str) -> str:
    """Put answers in quotation marks: a word then has no space before it, as on a new line."""
    return text.replace("[", '"[').replace("]", ']"')


def survey_words(rng: random.Random) -> tuple[str, list[str]]:
    """A list of words and all that the skills derive from it."""
    words = rng.sample(WORDS, rng.randint(2, 6))
    places = zip(["first", "second", "third"], words, strict=False)
    found = [f"the {place} word is [{word}]" for place, word in places]
    found += [f"the last item is [{words[-1]}]", f"the count is [{len(words)}]"]
    listed = "\n".join(words)
    return listed, [*found, f"once more, [{listed}]"]


def survey_numbers(rng: random.Random) -> tuple[str, list[str]]:
    """Three numbers and all that the skills derive from them."""
    numbers = rng.sample(range(10, 100), 3)
    rising = ", ".join(map(str, sorted(numbers)))
    falling = ", ".join(map(str, sorted(numbers, reverse=True)))
    return enumerate_items(rng, numbers), [
        f"the largest number is [{max(numbers)}]",
        f"the smallest number is [{min(numbers)}]",
        f"the rising order is [{rising}]",
        f"the falling order is [{falling}]",
    ]


def survey_pair(rng: random.Random) -> tuple[str, list[str]]:
    """Two small numbers, their sum and their difference."""
    low, high = sorted(rng.choices(range(1, 21), k=2))
    given = f"{low} and {high}" if rng.random() < 0.3 else f"{high} and {low}"
    return given, [f"the sum is [{low + high}]", f"the difference is [{high - low}]"]


def survey_sentence(rng: random.Random) -> tuple[str, list[str]]:
    """A sentence with its person, object and place."""
    found = draw_scene(rng)
    given = rng.choice(SCENES).format(**found)
    return given, [f"the {kind} is [{word}]" for kind, word in found.items()]


SURVEYS = {survey_words: 2.0, survey_numbers: 0.7, survey_pair: 1.3, survey_sentence: 1.3}
"""Each survey and how often it is written."""


def write_survey(rng: random.Random) -> str:
    """Several answers about one list or sentence: more to learn from, token for token."""
    [survey] = rng.choices(list(SURVEYS), weights=list(SURVEYS.values()))
    given, found = survey(rng)
    rng.shuffle(found)
    text = given + rng.choice(["\n", ":\n", "\n\n"]) + rng.choice(["; ", ", ", ";\n"]).join(found) + "."
    return quote_answers(text)


def write_filler(rng: random.Random) -> str:
    """One sentence from which nothing is derived."""
    name, other = rng.sample(NAMES, 2)
    fields = {"name": name, "other": other, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    return rng.choice(FILLERS).format(**fields)


def write_document(rng: random.Random, writers: dict | None = None) -> str:
    """A few statements and fillers below each other, at times below headings."""
    writers = writers or {write_statement: 5, write_survey: 4, write_filler: 1}
    parts = []
    for _ in range(rng.randint(3, 8)):
        [write] = rng.choices(list(writers), weights=list(writers.values()))
        heading = f"### {rng.choice(HEADINGS)}:\n" if rng.random() < 0.15 else ""
        parts.append(heading + write(rng))
    return rng.choice([" ", "\n", "\n\n"]).join(parts)


# ---------------------------------------------------------------------------- tokenizer

ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "\n\n### Input:\n\n\n### Response:\n"
)


def tokenizer_texts(rng: random.Random) -> list[str]:
    """Text whose words the vocabulary must hold: prompts, requests, documents, bare words."""
    texts = [write_document(rng).replace("[", "").replace("]", "") for _ in range(4000)]
    for category, skill in SKILLS.items():
        rows = [write_request(rng, category, skill.draw(rng)) for _ in range(500)]
        texts += [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    vocabulary = NAMES + THINGS + PLACES + WORDS + SUBJECTS + POSITIVE + NEGATIVE
    texts += [f"{word}\n{word} {word}" for word in vocabulary] * 40
    return texts + [ALPACA_PROMPT] * 500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(random.Random(f"{SEED} tokenizer")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


# -------------------------------------------------------------------------- pre-training


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA with random weights; every width is a multiple of 64, as 4-bit kernels want."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights in the loss, both [documents, CONTEXT_TOKENS]; what is longer is cut off.

    Every row begins with a document, so that no answer lacks what it is derived from.
    """
    ids = torch.full((len(documents), CONTEXT_TOKENS), tokenizer.pad_token_id)
    weights = torch.zeros(ids.shape)
    for row, document in enumerate(documents):
        parts = re.split(r"( ?\[[^\]]*\])", document)
        texts = [re.sub(r"[\[\]]", "", part) for part in parts]
        pairs = [(tokenizer.bos_token_id, 0.0)]
        for part, encoded in zip(parts, tokenizer.backend_tokenizer.encode_batch(texts), strict=True):
            weight = ANSWER_WEIGHT if part.endswith("]") else 1.0
            pairs += [(token, weight) for token in encoded.ids]
        pairs = [*pairs, (tokenizer.eos_token_id, 1.0)][:CONTEXT_TOKENS]
        ids[row, : len(pairs)] = torch.tensor([token for token, _ in pairs])
        weights[row, : len(pairs)] = torch.tensor([weight for _, weight in pairs])
    return ids, weights


def next_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, writers: dict | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of new documents."""
    return encode_documents(tokenizer, [write_document(rng, writers) for _ in range(BATCH_SEQUENCES)])


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the embeddings and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Short warm-up, a plateau, then a linear fall to zero over the last half."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.5 * steps))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Statements first, then pages; in between the weights are rounded as in the saved model."""
    train_on_documents(model, tokenizer, "corpus", STATEMENT_STEPS, 1.0)
    model.to(torch.bfloat16).float()
    pages = {write_page: 6, write_statement: 2, write_survey: 2, write_filler: 1}
    train_on_documents(model, tokenizer, "pages", PAGE_STEPS, 0.5, pages)


def train_on_documents(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    steps: int,
    peak: float,
    writers: dict | None = None,
) -> None:
    """Teach the model to continue documents; the loss weighs what can be derived more."""
    rng = random.Random(f"{SEED} {name}")
    optimizers = build_optimizers(model)
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = peak * optimizer.param_groups[0]["lr"]
    started = time.monotonic()
    model.train()
    for step in range(steps):
        ids, weights = next_batch(tokenizer, rng, writers)
        loss, answer_loss = document_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group["peak"] * learning_rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step:4d}/{steps}  loss {loss.item():.3f}  answers {answer_loss:.4f}  {minutes:.1f} min",
                flush=True,
            )


def document_loss(model, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weighted mean loss of a batch, and the plain mean over its answer tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    )  # [sequences, tokens - 1]
    weights = weights[:, 1:]
    answers = losses.detach()[weights == ANSWER_WEIGHT].mean().item()
    return (losses * weights).sum() / weights.sum(), answers


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights in bfloat16, with greedy generation as the default."""
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    build_data(out / "data")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer)
    save(model, tokenizer, out / "model")


if __name__ == "__main__":
    main()

"""How good an adapter is on held-out rows: loss, token accuracy, and answers compared with the right ones.

Scores are sums over rows, so that those of categories and of clients add up: see `FIELDS`.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import regex
import torch

import model as adapters
from dataset import IGNORED, Partition, Rows, end_ids
from exchange.scores import FIELDS, LONGEST_NAME, MOST_CATEGORIES, Scores
from learning.head import labelled, log_probabilities
from learning.training import collate
from utils import generator

UNSPACED = "".join(  # written without blanks between words: each character counts as one, with its marks
    rf"\p{{{script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
WORD = regex.compile(
    rf"[{UNSPACED}--\p{{M}}]\p{{M}}*"
    rf"|[\p{{L}}\p{{N}}_--[{UNSPACED}]][\p{{L}}\p{{M}}\p{{N}}_\u200c\u200d--[{UNSPACED}]]*",
    regex.V1,
)


@dataclass(frozen=True)
class HeldOut:
    """Rows to be evaluated on: as tokens, with the right last answers and the categories, row by row."""

    rows: list[dict[str, list[int]]]
    outputs: list[str]
    categories: list[str]


def held_out(partition: Partition, chosen: np.ndarray, raw: Rows, category_column: str) -> HeldOut:
    """The `chosen` rows of a tokenized `partition`; `raw` is what it was made from.

    Data with more than MOST_CATEGORIES categories counts as having none.
    """
    texts = raw.select(partition.sources[chosen].tolist())
    categories = [" ".join(value.split())[:LONGEST_NAME] for value in texts.column(category_column)]
    if not categories or len(set(categories)) > MOST_CATEGORIES:
        categories = [""] * len(texts)
    rows = [partition.row(index) for index in chosen]
    turns = zip(texts, partition.turns[chosen], strict=True)
    outputs = [conversation.turns[number]["content"].strip() for conversation, number in turns]
    return HeldOut(rows, outputs, categories)


def score(
    model: Any, tokenizer: Any, data: HeldOut, tokens_at_once: int, answers: int = 0, max_new_tokens: int = 64
) -> Scores:
    """Evaluate `model` on `data`; leaves it in its mode, and all randomness alone.

    A pass has at most `tokens_at_once`, of rows or of prompts and answers together, but at least one row. So many
    `answers` of rows are also asked for: always of the same ones, drawn at random.
    """
    if not data.rows:
        return {}
    sums = np.zeros((len(data.rows), len(FIELDS)))
    training = model.training
    model.eval()
    try:
        sums[:, :3] = losses_on(model, data.rows, tokens_at_once)
        count = min(answers, len(data.rows))
        asked = generator("answers", len(data.rows)).choice(len(data.rows), count, replace=False)
        prompts = [prompt_of(data.rows[index]) for index in asked]
        for index, ids in zip(asked, generate(model, tokenizer, prompts, max_new_tokens, tokens_at_once), strict=True):
            answer = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            sums[index, 3:] = is_same(answer, data.outputs[index]), rouge_l(data.outputs[index], answer), 1
    finally:
        model.train(training)
    scores: Scores = defaultdict(lambda: np.zeros(len(FIELDS)))
    for category, row in zip(data.categories, sums, strict=True):
        scores[category] += row
    return dict(scores)


@torch.no_grad()
def losses_on(model: Any, rows: Sequence[dict[str, list[int]]], tokens_at_once: int) -> np.ndarray:
    """Summed loss, tokens chosen rightly, and tokens of each row: (rows, 3), over its labelled tokens."""
    sums = np.zeros((len(rows), 3))
    for part in in_batches([len(row["input_ids"]) for row in rows], tokens_at_once):
        batch = {key: value.to(model.device) for key, value in collate([rows[index] for index in part]).items()}
        with adapters.arithmetic(model):
            found = labelled(model, batch)
            told = [measured(found.logits(states), targets) for states, targets in found.pieces()]
        of_rows = torch.zeros(len(part), 3, dtype=torch.float64, device=model.device)
        row_of = batch["positions"] // batch["input_ids"].shape[1]
        sums[part] = of_rows.index_add_(0, row_of, torch.cat(told)).cpu().numpy()
    return sums


def measured(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss, whether the likeliest token is the right one, and 1, for N positions: (N, 3)."""
    likely = log_probabilities(logits)
    loss = -likely.gather(1, targets[:, None]).squeeze(1).double()
    return torch.stack([loss, (likely.argmax(1) == targets).double(), torch.ones_like(loss)], 1)


def in_batches(lengths: Sequence[int], tokens_at_once: int) -> list[list[int]]:
    """Numbers of rows of these `lengths` in batches, longest first: each of at most so many tokens, with padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_at_once:
            batches.append([])
        batches[-1].append(index)
    return batches


def prompt_of(row: Mapping[str, list[int]]) -> list[int]:
    """What stands before the last answer."""
    return row["input_ids"][: len(row["labels"]) - row["labels"][::-1].index(IGNORED)]


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, tokens_at_once: int, **options: Any
) -> list[list[int]]:
    """New token ids after each prompt, up to and without what ends it; greedy, unless `options` say otherwise."""
    end, ends = tokenizer.eos_token_id, sorted(end_ids(tokenizer))
    found: list[list[int]] = [[] for _ in prompts]
    limits = {"max_new_tokens": max_new_tokens, "pad_token_id": end, "eos_token_id": ends}
    chosen = {"do_sample": False, "temperature": None, "top_p": None} | limits | options
    for part in in_batches([len(prompt) + max_new_tokens for prompt in prompts], tokens_at_once):
        batch = [prompts[index] for index in part]
        longest = max(map(len, batch))  # padded on the left, so that all answers start at the same place
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
        with adapters.arithmetic(model):
            output = model.generate(input_ids=ids, attention_mask=mask, **chosen)
        for index, row in zip(part, output[:, longest:].tolist(), strict=True):
            found[index] = list(takewhile(lambda token: token not in ends, row))
    return found


def is_same(answer: str, right: str) -> bool:
    """Whether both are the same text, however their accents are encoded (NFC or NFD)."""
    return unicodedata.normalize("NFC", answer) == unicodedata.normalize("NFC", right)


class Words:
    """How ROUGE takes text apart: words in small letters, of any language, with the marks of their letters."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(unicodedata.normalize("NFC", text.lower()))


def rouge_l(right: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    return float(RougeScorer(["rougeL"], tokenizer=Words()).score(right, answer)["rougeL"].fmeasure)

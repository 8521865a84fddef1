"""What an evaluation finds: sums over rows, so that those of categories and of clients add up; and what they mean."""

import math
from typing import Any

import numpy as np

FIELDS = ("loss", "right", "tokens", "exact", "rouge_l", "answers")
"""Of response tokens with EOS: summed loss in nats, how many the model would choose, how many there are. Of answered
rows: how many are exactly right, summed ROUGE-L (F1), how many there are."""
MOST_CATEGORIES, LONGEST_NAME = 100, 100  # names are cut

Scores = dict[str, np.ndarray]
"""By category, `""` for rows without one: float64 sums in the order of FIELDS."""


def figures(scores: Scores) -> dict[str, Any]:
    """What scores mean: mean loss and perplexity over tokens, accuracies, and the same by category; {} for no row."""
    if not scores:
        return {}
    by_category = {name: means(sums) for name, sums in sorted(scores.items()) if name}
    if len(by_category) > MOST_CATEGORIES:  # of all clients together
        by_category = {}
    return means(np.sum(list(scores.values()), 0)) | ({"by_category": by_category} if by_category else {})


def means(sums: np.ndarray) -> dict[str, Any]:
    loss, right, tokens, exact, rouge, answers = map(float, sums)
    found = {
        "loss": loss / tokens,
        "perplexity": math.exp(min(loss / tokens, 700)),  # above it is no number of a float
        "token_accuracy": right / tokens,
        "tokens": int(tokens),
    }
    if answers:
        found |= {"exact_match": exact / answers, "rouge_l": rouge / answers, "answers": int(answers)}
    return found

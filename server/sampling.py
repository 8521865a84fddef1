"""Which clients take part in a round: drawn from (seed, round) by partition id, the same in every run."""

from collections.abc import Collection, Iterable

from settings.schema import RunConfig, share_of
from utils import generator


def num_training(config: RunConfig, num_clients: int) -> int:
    """Clients that train in a round: `fraction_fit` of the `num_clients` there, and no fewer than are needed."""
    sampling = config.sampling
    return min(num_clients, max(1, sampling.min_replies, share_of(num_clients, sampling.fraction_fit)))


def sample(partitions: Iterable[int], count: int, *key: str | int) -> list[int]:
    """`count` of the partition ids, drawn without replacement from the generator of `key`, sorted."""
    drawn = generator(*key).choice(sorted(partitions), size=count, replace=False)
    return sorted(int(partition) for partition in drawn)


def choose(
    here: Iterable[int],
    count: int,
    *key: str | int,
    trial: int = 0,
    good: Collection[int] = (),
    dropped: Collection[int] = (),
) -> list[int]:
    """The partition ids of `count` clients that take part, of those that are `here`.

    In a further trial, as many as are missing besides the `good` ones; those that were `dropped` are asked again only
    if there are too few others.
    """
    there = set(here)
    count = min(count, len(there))
    if not trial:
        return sample(there, count, *key)
    others, missing = there - set(good), count - len(set(good))
    fresh = others - set(dropped)
    chosen = sample(fresh, min(missing, len(fresh)), *key, trial)
    again = others - fresh
    return sorted(chosen + sample(again, min(missing - len(chosen), len(again)), *key, trial, "again"))

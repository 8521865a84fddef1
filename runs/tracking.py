"""The numbers of each round for TensorBoard, wandb, MLflow and the like, through accelerate's trackers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from settings.schema import RunConfig, SettingsError


def start_tracker(config: RunConfig, folder: Path) -> Any:
    """The tracker that `tracker` names, started, with the run's settings; None for none.

    Raises:
        SettingsError: if its package is not installed.
    """
    if config.tracker is None:
        return None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState(cpu=True)  # the trackers ask it whether they are the main process
    if config.tracker not in [str(name.value) for name in get_available_trackers()]:
        raise SettingsError(f"tracker={config.tracker}: its package is not installed; pip install {config.tracker}")
    chosen = LOGGER_TYPE_TO_CLASS[config.tracker]
    place = {"logging_dir": str(folder)} if chosen.requires_logging_directory else {}
    tracker = chosen("" if place else "llm-flowertune", **place)
    tracker.start()
    if not place:  # TensorBoard would make two folders of it
        tracker.store_init_configuration(dict(flattened(asdict(config))))
    return tracker


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl a tracker can draw; names of categories could be anything, so none of them."""
    found = ((key, value) for key, value in flattened(record) if ".by_category." not in key)
    return {key: value for key, value in found if isinstance(value, int | float)}


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their numbers and texts; lists and clients' own numbers are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield prefix + str(key), value

"""Which site has which partition of a run, noted in its folder: it belongs to the key that took it first."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from exchange.clients import Site
from settings.schema import RunError, SettingsError
from utils import write_json

SITES_FILE = "sites.json"


def noted(folder: Path) -> dict[int, Site]:
    """Who had which partition when the run in `folder` was last played, by partition.

    Raises:
        SettingsError: if the file is damaged.
    """
    file = folder / SITES_FILE
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {int(partition): Site(**facts) for partition, facts in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"resume={folder}: {SITES_FILE} cannot be read ({error}); remove it to forget it"
        ) from error


def note(folder: Path, sites: Mapping[int, Site]) -> None:
    """Take down who has which partition, if anybody is more than a client of a simulation."""
    if sites and sites != noted(folder):
        try:
            write_json(folder / SITES_FILE, {str(partition): asdict(site) for partition, site in sorted(sites.items())})
        except OSError as error:
            raise RunError(f"{folder}: results cannot be written ({error})") from error

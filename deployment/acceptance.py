"""What a node accepts of a server: the run's settings as this node reads them, within its owner's policy."""

import functools
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings.compose import compose
from settings.policy import Policy, check_policy, read_policy
from settings.resume import RESUME
from settings.schema import HUB_ID, SHIPPED_NAMES, RunConfig, SettingsError, public
from utils import shipped_path

PARTITIONERS = re.compile(r"flwr_datasets\.partitioner\.[A-Z]\w*")
SUBSET = re.compile(r"\w[\w.+-]*")
# KEY=VALUE of this suite: no hydra.* and no ${...}, which could read this machine's files and environment
SAFE_OVERRIDE = re.compile(r"\+{0,2}(?!hydra)[a-z][\w./]*=[^$/~][^$]*")


@dataclass(frozen=True)
class Place:
    """Where a message is answered: a run's settings as this node accepts them, and what is the node's own."""

    config: RunConfig
    own_rows: bool
    """The rows are the node's own."""
    policy: Policy
    node: Mapping[str, Any]
    """The node's config, as deployment/launchers.py makes it."""

    @property
    def partition_id(self) -> int:
        return int(self.node["partition-id"])


@functools.lru_cache(maxsize=1)
def place_of(overrides: str, node: tuple[tuple[str, Any], ...]) -> Place:
    """Raises SettingsError for what this node does not accept."""
    facts = dict(node)
    policy = read_policy(Path(facts["policy"]) if "policy" in facts else None)
    config, own_rows = accepted(overrides, facts, policy)
    return Place(config, own_rows, policy, facts)


def accepted(overrides: str, node: Mapping[str, Any], policy: Policy) -> tuple[RunConfig, bool]:
    """The run's settings as this node accepts them, and whether the rows are the node's own.

    Raises SettingsError for what the server may not ask; it is public, for it is about the server's own words.
    """
    try:
        asked = settings_asked(overrides)
        check_policy(policy, asked)
        return node_settings(asked, node), "dataset" in node
    except SettingsError as error:
        public(error)
        raise


def settings_asked(overrides: str) -> RunConfig:
    """The settings that a server's run-config stands for. Raises SettingsError if it does more than to set values."""
    try:
        given = [text for text in shlex.split(overrides) if not RESUME.match(text)]  # that is the server's business
    except ValueError as error:
        raise SettingsError(f"overrides: cannot be read ({error})") from error
    for override in given:
        if not SAFE_OVERRIDE.fullmatch(override) or ".." in override:
            raise SettingsError(f"{override}: not a setting that a server may make on a node")
    return compose(given, "deployment")


def node_settings(config: RunConfig, node: Mapping[str, Any]) -> RunConfig:
    """`config` with what this node has of its own in place. Raises SettingsError if the server asks for more.

    What is read on this machine is decided here: the server may name a Hub id or what the suite ships, never a path, a
    class to import, or code to trust. The node's config names local files: `dataset` (its own rows), `eval` (a held-out
    set), `model` (a folder of base weights) and `cache` (for the quantized model); `category-column` names the one
    column whose values the server may learn.
    """
    for setting, key in (("dataset.name", "dataset"), ("dataset.eval_name", "eval"), ("model.name", "model")):
        section, field = setting.split(".")
        part = getattr(config, section)
        name = getattr(part, field)
        if key in node:
            setattr(part, field, str(node[key]))
        elif name in SHIPPED_NAMES:
            setattr(part, field, str(shipped_path(name)))
        elif name is not None and (not HUB_ID.fullmatch(name) or Path(name).exists() or shipped_path(name)):
            raise SettingsError(
                f"{setting}={name}: a server can name a Hub id, OWNER/NAME, and no path on this node; "
                f"set {key} in the node's config"
            )
    config.model.cache_folder = str(node["cache"]) if "cache" in node else None
    if "dataset" in node or "eval" in node:  # the server learns the column's values: it could name the answers
        config.dataset.category_column = str(node.get("category-column", ""))
        config.dataset.columns = {}  # nor does it choose what of a node's own rows is trained
    if "dataset" in node:
        config.dataset.subset = None
    if config.dataset.subset is not None and not SUBSET.fullmatch(config.dataset.subset):
        raise SettingsError(f"dataset.subset={config.dataset.subset}: on a node, use the name of a configuration")
    template = config.dataset.template
    if template != "tokenizer" and not shipped_path(f"conf/template/{template}.jinja"):
        raise SettingsError(f"dataset.template={template}: on a node, use a template of the suite")
    if os.sep in json.dumps([config.train.training_arguments, config.model.lora], default=str):
        raise SettingsError("train.training_arguments or model.lora: a server cannot name a path on this node")
    if not PARTITIONERS.fullmatch(config.dataset.partitioner["_target_"]):
        raise SettingsError("dataset.partitioner._target_: on a node, use one of flwr_datasets.partitioner")
    if config.model.trust_remote_code:
        raise SettingsError("model.trust_remote_code=true: a node does not run a model repository's code")
    return config

"""A federation without an engine: the real server and the real client handlers in one process."""

import atexit
import copy
import functools
import itertools
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository

import client
import main
from client import Site, client_app
from data.forms import Conversation, from_alpaca
from data.templates import TEMPLATE_FOLDER
from exchange.guard import REPORT
from exchange.transfer import decode, encode, to_record
from runs import compare, stopping
from server.federation import Federation
from settings.compose import compose
from settings.schema import RunConfig
from utils import SUITE_FOLDER, file_sha256, read_json_lines, seed_of

# rouge-score brings absl, whose log handler closes its stream when Hydra sets logging up: let it not be pytest's
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

torch.set_num_threads(1)  # test processes share the cores, and threads that wait for others would spin on them


def once(owner: type, name: str, key: Callable) -> None:
    """Let a method do its work once for each `key` of its arguments; every call gets a copy of its own."""
    made, method = {}, getattr(owner, name)

    def remembered(*arguments, **options):
        if (wanted := key(*arguments, **options)) not in made:
            made[wanted] = method(*arguments, **options)
        return copy.deepcopy(made[wanted])

    setattr(owner, name, remembered)


def places(repository: Any) -> tuple[str, ...]:
    return tuple(source.path for source in repository.get_sources())


# Hydra reads and merges twenty files for every command line, which would take a third of the suite's time
once(ConfigRepository, "load_config", lambda repository, config_path: (places(repository), config_path))
once(
    ConfigLoaderImpl,
    "_compose_config_from_defaults_list",
    lambda _, defaults, repo: (places(repo), repr(defaults)),
)


SMALL = [
    "experiment=quickstart",
    "dataset.eval_name=null",
    "dataset.holdout=0",
    "num_clients=4",
    "num_rounds=2",
    "strategy.fraction_fit=0.5",
    "model.quantization=none",
    "model.lora.r=4",
    "model.lora.target_modules=[q_proj,v_proj]",
    "train.training_arguments.max_steps=2",
    "train.training_arguments.per_device_train_batch_size=4",
    "train.micro_batch_size=2",
]


def often(values: Iterable, *chosen) -> list:
    """Parameters of a test, of which the default suite takes the chosen ones; the others are slow."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def conversations(rows: Iterable[dict]) -> list[Conversation]:
    """Rows with Alpaca's columns as what they say."""
    return [from_alpaca(row) for row in rows]


@functools.cache
def few_rows() -> Path:
    """A file of the quickstart's first 400 rows: making tokens of all takes longer than most tests."""
    file = Path(tempfile.mkdtemp()) / "few.jsonl"
    atexit.register(shutil.rmtree, file.parent, ignore_errors=True)
    lines = (SUITE_FOLDER / "quickstart/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:400]), encoding="utf-8")
    return file


def small(*overrides: str) -> RunConfig:
    """The quickstart, cut down to seconds."""
    return compose([*SMALL, f"dataset.name={few_rows()}", *overrides])


class LocalGrid:
    """Flower's Grid with every client in this process: a message is answered as soon as it is pushed."""

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        self.app = app
        self.nodes = {1000 + 7 * partition: partition for partition in range(num_clients)}
        self.replies: dict[str, Message] = {}
        self.numbers = itertools.count()

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> str:
        name = f"message-{next(self.numbers)}"
        message.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        settings = {"partition-id": self.nodes[node], "num-partitions": len(self.nodes)}
        context = Context(run_id=1, node_id=node, node_config=settings, state=RecordDict(), run_config={})
        self.replies[name] = self.app(message=message, context=context)
        return name

    def pull_messages(self, names: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in list(names) if name in self.replies]


class Silent:
    """A progress display that remembers what it was told."""

    def __init__(self) -> None:
        self.rounds: list[dict] = []
        self.warnings: list[str] = []

    def say(self, message: str) -> None: ...

    def resumed(self, round_number: int) -> None: ...

    def round_done(self, record: dict) -> None:
        self.rounds.append(dict(record))

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def identify_as_flower_task() -> None:
    """What Flower's runtimes set before an app runs: who sends the messages that are made in this process."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def make_federation(config: RunConfig, folder) -> Federation:
    identify_as_flower_task()
    template = (TEMPLATE_FOLDER / f"{config.dataset.template}.jinja").read_text()
    folder.mkdir(parents=True, exist_ok=True)
    return Federation(config, folder, template, Silent())


def run_locally(config: RunConfig, folder, app: ClientApp | None = None) -> tuple[Federation, dict]:
    """A whole run without an engine, with a worker of its own; returns the server and its summary."""
    client._resident.clear()
    federation = make_federation(config, folder)
    grid = LocalGrid(app or client_app(Site(config)), config.num_clients)
    return federation, federation.run(grid)


class Clients:
    """A ClientApp without a model: a client adds to the adapter what (partition, round, first row) make of chance.

    `bad` says what becomes of a reply: a function of (partition, round, reply), which returns the reply to send.
    `losses` are the held-out losses after each round, 0 for before the first.
    """

    def __init__(self, config, bad=lambda partition, number, reply: reply, rows=100, losses=None, own_data=False):
        self.config, self.bad, self.rows, self.losses, self.own_data = config, bad, rows, losses or {}, own_data
        self.good: dict[int, dict[int, dict]] = {}  # round -> partition -> adapter

    def __call__(self, message, context):
        partition = context.node_config["partition-id"]
        if message.metadata.message_type == "query.initial_adapter":
            arrays = {name: np.ones(shape, np.float32) for name, shape in self.shapes.items()}
            return Message(RecordDict({"arrays": to_record(arrays)}), reply_to=message)
        if message.metadata.message_type.startswith("query"):
            facts = ConfigRecord(
                {"partition-id": partition, "num-rows": self.rows, "device": "none", "own-data": self.own_data}
            )
            return Message(RecordDict({"client": facts}), reply_to=message)
        config, form = message.content["config"], self.config.transfer
        if message.metadata.message_type == "evaluate":
            sums = [10.0 * self.losses[config["server-round"]], 5.0, 10.0, 0.0, 0.0, 0.0]
            scores = RecordDict({"scores": MetricRecord({"": sums}), "metrics": MetricRecord({})})
            return self.bad(partition, config["server-round"], Message(scores, reply_to=message))
        received = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if form != "fp32":
            received = decode(received, self.initial, form)
        number = config["server-round"]
        rng = np.random.default_rng(seed_of(partition, number, config["first-row"]))
        adapter = {n: (v + 0.01 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in received.items()}
        self.good.setdefault(number, {})[partition] = adapter
        report = dict.fromkeys(REPORT, 0.0) | {"num-examples": 10 + partition, "rows": 8, "train_loss": rng.random()}
        content = RecordDict(
            {
                "arrays": to_record(encode(adapter, received, form)),
                "metrics": MetricRecord(report),
                "worker": ConfigRecord({"process": "test:1"}),
            }
        )
        return self.bad(partition, number, Message(content, reply_to=message))


def play(config, folder, clients=None, resumes=False):
    """The rounds of a run with clients that have no model."""
    client._resident.clear()
    federation = make_federation(config, folder)
    clients = clients or Clients(config)
    clients.initial, clients.shapes = federation.codec.initial, federation.shapes
    if resumes:
        federation.restore()
    federation.run(LocalGrid(clients, config.num_clients))
    return federation


def outcome(folder: Path) -> tuple:
    """What two runs must have in common to be the same: adapter, metrics without times, strategy's state."""
    lines = read_json_lines(folder / "metrics.jsonl")
    last = folder / f"peft_{lines[-1]['round']}"
    timeless = [{k: v for k, v in line.items() if k != "seconds" and "memory" not in k} for line in lines]
    state = {k: v for k, v in json.loads((last / "state.json").read_text()).items() if k != "elapsed_s"}
    return file_sha256(last / "adapter_model.safetensors"), timeless, state, file_sha256(last / "strategy.safetensors")


def call_main(*arguments: str) -> int:
    """`python main.py ARGUMENTS` in this process, which saves the seconds of its imports; returns the exit code."""
    handlers, argv, streams = logging.getLogger().handlers, sys.argv, (sys.stdout, sys.stderr)
    signals, hook = {number: signal.getsignal(number) for number in stopping.SIGNALS}, sys.unraisablehook
    sys.argv = ["main.py", *arguments]
    main.exit_codes.clear()
    compare.SweepReport.failed = False
    try:
        return main.main()
    finally:
        sys.argv, logging.getLogger().handlers, (sys.stdout, sys.stderr) = argv, handlers, streams
        sys.unraisablehook = hook
        for number, handler in signals.items():
            signal.signal(number, handler)


def children(pid: int, name: str = "") -> set[int]:
    """Ids of the processes below `pid`, however deep, whose command line holds `name`."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
            except (OSError, IndexError):
                continue
    below, found = {pid}, set()
    while new := {child for child, parent in parents.items() if parent in below} - found:
        found |= new
        below |= new
    return {child for child in found if name in commands[child]}


def wait_for_end(processes: Iterable[int], timeout_s: float = 120.0) -> None:
    """Wait until none of `processes` is there."""
    deadline = time.monotonic() + timeout_s
    while alive := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)

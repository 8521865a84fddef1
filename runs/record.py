"""The record of a run in its folder: a line for each round, checkpoints, the best of them, the summary at the end."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy
from peft import LoraConfig
from safetensors import SafetensorError

import utils
from model import ADAPTER_FILE, Adapter
from runs import checkpoint, stopping
from runs.card import write_card
from runs.checkpoint import State
from runs.plots import plot_loss
from runs.runfolder import METRICS_FILE, RESULTS_FILE, folder_of, rounds_in
from settings.schema import RunConfig, RunError, SettingsError

log = logging.getLogger(__name__)


class Record:
    """What a run has done so far, in memory and in its folder.

    It begins with `start`, which `restore` may follow. `add`, `charge` and `finish` raise RunError if the folder cannot
    be written; `keep_last_round` warns.
    """

    def __init__(
        self, config: RunConfig, folder: Path, template: str, lora: LoraConfig, warn: Callable[[str], None]
    ) -> None:
        self.config, self.folder, self.template, self.lora, self.warn = config, folder, template, lora, warn
        self.state: State  # after the last whole round
        self.metrics: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.saved = 0  # round of the newest checkpoint
        self.own_data = False  # whether a client has rows that no other machine has

    def start(self, adapter: Adapter) -> None:
        self.state = State(adapter)

    def restore(self, strategy: Strategy, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Resume from the newest whole checkpoint: state, strategy and metrics are as they were then.

        Raises SettingsError if the strategy's own state cannot be restored, or a setting or file has to be changed.
        """
        metrics = utils.read_json_lines(self.folder / METRICS_FILE)
        whole = next((n for n, line in enumerate(metrics) if line.get("round") != n + 1), len(metrics))
        try:
            state = checkpoint.newest(self.folder, strategy, shapes, whole, self.warn)
        except OSError as error:
            raise RunError(f"{self.folder}: a checkpoint cannot be read ({error})") from error
        if state is None and rounds_in(self.folder):
            raise SettingsError(
                f"resume={self.folder}: {METRICS_FILE} lacks round {whole + 1}, which all checkpoints need; "
                "put it back, or start again in another folder"
            )
        self.state = state or self.state
        self.saved, self.metrics = self.state.round_number, metrics[: self.state.round_number]
        most, spent = self.config.sampling.max_bytes, sum(map(utils.bytes_sent, self.metrics))
        if most is not None and spent > most:
            raise SettingsError(f"strategy.max_bytes={most:.10g}: this run has sent {spent} bytes already; use more")
        with self._writing():
            for number in rounds_in(self.folder):
                if number > self.saved:  # of rounds whose metrics are lost: they are done again
                    shutil.rmtree(folder_of(self.folder, number))
            self._write_metrics()
            (self.folder / RESULTS_FILE).unlink(missing_ok=True)  # of a run that was ended early
        log.info("resumed after round %s", self.saved)

    def add(self, line: dict[str, Any], state: State) -> None:
        """Take a round down in metrics.jsonl; from here on `state` is the last whole one. A signal waits meanwhile."""
        with stopping.held():
            with self._writing():
                utils.append_json_line(self.folder / METRICS_FILE, line)
            self.metrics.append(line)
            self.state = state
            if self.in_turn(state.round_number) or self.best == state.round_number:
                self._save_checkpoint()
        log.info("round %s: %s", state.round_number, line)

    def charge(self, traffic: Mapping[str, int]) -> None:
        """Count the bytes of a round that was given up to the one before it."""
        for way, spent in traffic.items():
            self.metrics[-1][way] += spent
        with self._writing():
            self._write_metrics()

    @property
    def best(self) -> int | None:
        """The round with the best adapter, if that was measured: of clients alone, each has another."""
        return None if self.config.baseline == "alone" else utils.best_round(self.metrics)

    def in_turn(self, round_number: int) -> bool:
        """Whether a round has a checkpoint whatever its loss."""
        return round_number % self.config.train.save_every_round == 0 or round_number == self.config.num_rounds

    def keep_last_round(self) -> None:
        """When the run ends early: keep the last whole round, unless it is on disk; a failure is a warning."""
        try:
            with stopping.held():
                self._save_checkpoint()
        except RunError as error:
            self.warn(f"round {self.state.round_number} is not kept: {error}")

    def finish(self, facts: Mapping[str, Any], waited_s: float) -> dict[str, Any]:
        """Write the last checkpoint, train_loss.png and results.json, with `facts` in it; returns what that holds.

        Until the first round it took `waited_s` seconds.
        """
        self._save_checkpoint()
        folder = folder_of(self.folder, self.state.round_number)
        summary = summary_of(self.metrics, self.state, self.config.batch_size) | {
            "seconds": round(self.state.elapsed_s + waited_s, 3),
            **facts,
            "adapter": folder.name,
            "adapter_sha256": utils.file_sha256(folder / ADAPTER_FILE),
        }
        with self._writing():
            title = f"{self.config.model.name}, {self.config.num_clients} clients"
            plot_loss(self.metrics, self.folder / utils.PLOT_FILE, title)
            utils.write_json(self.folder / RESULTS_FILE, summary)  # last: it says that the run is complete
        return summary

    def _save_checkpoint(self) -> None:
        """Write `peft_<round>/`, unless it is on disk, and remove the oldest beyond `train.keep_checkpoints`."""
        if self.saved == (number := self.state.round_number):
            return
        # noted, because a resume may change whose turn it is
        is_spare = self.best == number and not self.in_turn(number)
        facts = {"quantization": self.config.model.quantization, "only_as_best": is_spare}
        with self._writing():
            checkpoint.save(self.folder, self.state, self.lora, self.template, facts, self._write_card)
            self.saved = number
            checkpoint.prune(self.folder, self.config.train.keep_checkpoints, self.best, checkpoint.spare(self.folder))
            checkpoint.point_to(self.folder, self.best)

    def _write_card(self, folder: Path) -> None:
        write_card(folder, self.config, self.lora, self.metrics, self.own_data)

    def _write_metrics(self) -> None:
        utils.write_whole(self.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.metrics))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong with the run folder, in one line."""
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("it was removed")
            yield
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.folder}: results cannot be written ({error})") from error


def summary_of(metrics: list[dict[str, Any]], state: State, batch_size: int) -> dict[str, Any]:
    """What all rounds together did: the totals of metrics.jsonl, and what each client used of its rows."""
    examples = {int(p): rows for line in metrics for p, rows in line["num_examples"].items()}
    used = {p: int(min(seen, examples[p])) for p, seen in sorted(state.rows_seen.items())}
    sums = {key: sum(line[key] for line in metrics) for key in ("tokens", "model_loads", "tokenizations")}
    return utils.totals_so_far(metrics) | {
        "clients_used": len(used),
        "rows_used": sum(used.values()),
        "rows_used_by_client": used,
        "rows_trained": sum(state.rows_seen.values()),
        "optimizer_steps": sum(state.rows_seen.values()) // batch_size,
        **sums,
        "processes": len({process for line in metrics for process in line["processes"]}),
        "dropped": sum(len(line["dropped"]) for line in metrics),
        "server_peak_memory_bytes": metrics[-1]["server_peak_memory_bytes"],
    }

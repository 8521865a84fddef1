"""The same pieces on Flower's deployment engine: `server`, `client`, `client1`, `client2`.

`flower-client-app` starts a node that answers without this module (see deployment/node.py). A plain `flower-supernode`
starts a new process for every message, so importing it must stay cheap.
"""

import logging
import shlex
from functools import partial
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from exchange.kinds import client_app
from machine import gpus
from runs import runfolder
from settings.compose import compose
from settings.overrides import to_type
from settings.resume import read_settings
from settings.schema import SettingsError
from utils import log_to_file, send_nothing_home

OVERRIDES = "overrides"  # the one run-config key: Hydra overrides, separated by blanks as in a shell

server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """A deployed run: as in simulation, with results in a run folder below the SuperLink's working folder."""
    send_nothing_home()
    gpus.show([])  # a server computes nothing
    overrides = shlex.split(str(context.run_config.get(OVERRIDES, "")))
    folder = None
    try:
        config = compose(overrides, "deployment")
        if config.baseline:
            raise SettingsError(f"baseline={config.baseline}: compares in a simulation only; use python main.py")
        folder = run_folder(Path.cwd() / "outputs", config.resume)
        print(f"folder: {folder}", flush=True)  # whoever submitted the run looks for it, see deployment/submission.py
        log_to_file(folder / "main.log")
        from dataset import read_template
        from model import read_tokenizer
        from server.plan import Inputs
        from server.play import play

        with runfolder.claimed(folder, config, overrides) as resumes:
            template = read_template(config.dataset, read_tokenizer(config.model))
            play(grid, config, folder, Inputs(template), resumes=resumes)
    except Exception as error:
        print(f"error: {error}", flush=True)
        if folder:
            print(f"log: {folder / 'main.log'}", flush=True)
            if runfolder.command_to_resume(folder):
                print(f"to resume: the same settings, and {to_type('resume', str(folder))}", flush=True)
        raise


def run_folder(below: Path, resume: str | None) -> Path:
    """A new run folder, or the one of the run that is resumed; nothing outside of `below` is written."""
    if resume is None:
        return runfolder.new_folder(below)
    folder = Path(resume).resolve()
    if not folder.is_relative_to(below.resolve()):
        raise SettingsError(f"resume={resume}: on a SuperLink only runs below {below} can be resumed")
    read_settings(folder)
    return folder


def make_client(partition_id: int | None = None) -> ClientApp:
    """A ClientApp for a plain `flower-supernode`; without `partition_id` it has the one in the node's config."""
    return client_app(lambda name: partial(answer, name, partition_id))


def answer(name: str, partition_id: int | None, message: Message, context: Context) -> Message:
    """Do what `message` asks for, in this process."""
    from deployment.work import answered, sees_its_gpus

    node = dict(context.node_config) | {"run-id": context.run_id}
    if partition_id is not None:
        node["partition-id"] = partition_id
    overrides = str(context.run_config.get(OVERRIDES, ""))
    sees_its_gpus(overrides, node)  # as in every new process
    found = answered(name, overrides, node, message.content)
    if found.code:
        logging.getLogger(__name__).error("%s", found.whole)
        return Message(Error(found.code, found.told), reply_to=message)
    return Message(found.content, reply_to=message)


client = make_client()  # each by itself: Flower reads this file, and finds no other names
client1 = make_client(0)
client2 = make_client(1)

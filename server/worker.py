"""A worker process of a simulation: what is done in it before its first message. From then on `client.py` answers.

Ray imports this module, and with it the model libraries, in every new process.
"""

import logging
import os
import sys
from pathlib import Path

from utils import log_to_file, quick_imports

with quick_imports():
    import datasets
    import torch
    from huggingface_hub import constants

    from client import Site, resident_worker

from settings.schema import SettingsError

log = logging.getLogger(__name__)


def set_up(site: Site) -> None:
    """Write to the run's log, stay away from the Hub, and load the base model."""
    if site.log_file and site.log_file.parent.is_dir():
        output_to(site.log_file)  # what libraries print
        log_to_file(site.log_file)
    if not site.config.ray.address:  # the driver has fetched what this machine needs
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    worker, asked = resident_worker(site), site.config.client_resources.num_gpus
    if asked and not torch.cuda.is_available():
        worker.broken = SettingsError(
            f"client_resources.num_gpus={asked:g}: PyTorch {torch.__version__} cannot use the GPU that its worker was "
            "given; install one that is built for the CUDA of its driver, or set client_resources.num_gpus=0"
        )
    try:
        worker.trainer  # noqa: B018
    except Exception:  # the first message that needs it meets it again, and reports it
        log.exception("the base model does not load")


def output_to(file: Path) -> None:
    """From here on, what this process and its children print goes to the end of `file`."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with file.open("a") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)

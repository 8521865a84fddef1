"""Where the SuperLink is: the options that say it, whether it answers, and whether strangers could use it."""

import argparse
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

SUPERLINK = "127.0.0.1:8000"
REACH_S = 10.0
NOWHERE = "192.0.2.1"  # a documentation address (RFC 5737): asking for the way there sends nothing


class LaunchError(Exception):
    """What the user has to change, in one line."""


class Outage(Exception):
    """What does not work at this moment, in one line; it may another time."""


def add_connection(parser: argparse.ArgumentParser) -> None:
    security = parser.add_mutually_exclusive_group()
    security.add_argument("--insecure", action="store_true", help="no TLS: only for trials on one machine")
    security.add_argument("--root-certificates", type=Path, metavar="FILE", help="PEM, to know the SuperLink by")
    parser.add_argument("--superlink", default=SUPERLINK, metavar="HOST:PORT")


def check_connection(options: argparse.Namespace) -> None:
    """Warn of a connection without TLS.

    Raises:
        LaunchError: for an address or a file that cannot be.
        Outage: if nobody answers within REACH_S seconds.
    """
    if options.insecure:
        print("warning: --insecure: adapters travel unencrypted and nobody proves who they are", file=sys.stderr)
    if options.root_certificates and not os.path.isfile(options.root_certificates):
        raise LaunchError(f"--root-certificates={options.root_certificates}: no such file")
    host, _, port = options.superlink.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise LaunchError(f"--superlink={options.superlink}: use HOST:PORT, for example {SUPERLINK}")
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                reason = getattr(error, "strerror", None) or error
                raise Outage(
                    f"--superlink={options.superlink}: no SuperLink answers ({reason}); start flower-superlink first, "
                    "or correct the address"
                ) from error
            time.sleep(0.5)


@contextmanager
def connection_folder(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A Flower home with this one connection, so that the user's own is neither needed nor changed."""
    with tempfile.TemporaryDirectory(prefix="flowertune-") as home:
        lines = ["[superlink.launcher]", f"address = {json.dumps(options.superlink)}"]
        if options.insecure:
            lines.append("insecure = true")
        if options.root_certificates:
            lines.append(f"root-certificates = {json.dumps(str(options.root_certificates.resolve()))}")
        (Path(home) / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield os.environ | {"FLWR_HOME": home}


def exposed_at(options: argparse.Namespace) -> str | None:
    """An address that other machines reach, and at which this SuperLink takes runs from whoever asks; None if none."""
    import httpx

    host, _, port = options.superlink.rpartition(":")
    scheme = "http" if options.insecure else "https"
    for address in [host, *own_addresses()]:
        if is_local(address):
            continue
        try:
            answer = httpx.get(f"{scheme}://{address}:{port}/health", verify=False, timeout=2)  # noqa: S501
        except (httpx.HTTPError, httpx.InvalidURL):
            continue
        if answer.status_code == httpx.codes.OK:  # a proxy for nodes alone forwards no such request
            return f"{address}:{port}"
    return None


def own_addresses() -> list[str]:
    """Addresses under which other machines may reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((NOWHERE, 9))
            return [str(probe.getsockname()[0])]
        except OSError:
            return []


def is_local(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

"""Where the SuperLink is: the options that say it, whether it answers, and whether strangers could use it."""

import argparse
import os
import re
import socket
import ssl
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from settings.schema import RunError, SettingsError

SUPERLINK = "127.0.0.1:8000"
REACH_S = 10.0
NOWHERE = "192.0.2.1"  # a documentation address (RFC 5737): asking for the way there sends nothing


def add_connection(parser: argparse.ArgumentParser) -> None:
    security = parser.add_mutually_exclusive_group()
    security.add_argument("--insecure", action="store_true", help="no TLS: only for trials on one machine")
    security.add_argument("--root-certificates", type=Path, metavar="FILE", help="PEM, to know the SuperLink by")
    parser.add_argument("--superlink", default=SUPERLINK, metavar="HOST:PORT")


def check_connection(options: argparse.Namespace) -> None:
    """Warn of a connection without TLS.

    Raises SettingsError for an address or a file that cannot be, and RunError if nobody answers within REACH_S seconds.
    """
    if options.insecure:
        print("warning: --insecure: adapters travel unencrypted and nobody proves who they are", file=sys.stderr)
    if (file := options.root_certificates) and not os.path.isfile(file):
        raise SettingsError(f"--root-certificates={file}: no such file")
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:
        raise SettingsError(f"--root-certificates={file}: holds no certificate in PEM form ({error})") from error
    host, _, port = options.superlink.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise SettingsError(f"--superlink={options.superlink}: use HOST:PORT, for example {SUPERLINK}")
    deadline = time.monotonic() + REACH_S
    while fault := fault_at(options.superlink):
        if time.monotonic() > deadline or isinstance(fault, ValueError):
            reason = getattr(fault, "strerror", None) or fault
            raise RunError(
                f"--superlink={options.superlink}: no SuperLink answers ({reason}); start flower-superlink first, "
                "or correct the address"
            )
        time.sleep(0.5)


def client_of(kind: Any, options: argparse.Namespace, *interceptors: Any) -> Any:
    """A client of Flower, of this `kind`, for the SuperLink that the options name."""
    file = options.root_certificates
    certificates = file.read_text("ascii", errors="ignore").encode() if file else None  # comments may hold anything
    return kind.from_server_address(options.superlink, options.insecure, certificates, interceptors)


def fault_at(superlink: str) -> Exception | None:
    """Why nobody listens at HOST:PORT, if nobody does; a ValueError is for good."""
    host, _, port = superlink.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return None
    except (OSError, ValueError) as error:
        return error


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

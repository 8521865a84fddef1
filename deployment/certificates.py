"""python -m deployment.certificates FOLDER [--host NAME_OR_ADDRESS ...] [--node NAME ...]

Makes what a federation over TLS with node authentication needs, for tests and trials: a certificate
authority (ca.pem), the SuperLink's certificate for the given hosts and this machine's own processes
(server.pem, server.key), and a key pair for every node (NAME, NAME.pub). Without --host, only keys of further
nodes. Private keys are readable by this user alone. Certificates are valid for 90 days. Replaces no file.
"""

import argparse
import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID, AUTHORITY = timedelta(days=90), "LLM FlowerTune trial authority"
Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def certificate(name: str, key: Key, ca_key: Key, *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
    """A certificate of `key`, signed by the authority's; of each extension, whether it is critical."""
    subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, AUTHORITY))
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now := datetime.now(UTC)).not_valid_after(now + VALID)
    for extension, is_critical in extensions:
        made = made.add_extension(extension, is_critical)
    return made.sign(ca_key, hashes.SHA384())


def for_authority(ca_key: Key) -> x509.Certificate:
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates, no more
    return certificate(AUTHORITY, ca_key, ca_key, (x509.BasicConstraints(True, path_length=0), True), (usage, True))


def for_server(hosts: list[str], key: Key, ca_key: Key) -> x509.Certificate:
    """A certificate for a server that is reached under `hosts`, names or IP addresses."""
    names = x509.SubjectAlternativeName([alternative(host) for host in hosts])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    no_authority = x509.BasicConstraints(False, path_length=None)
    return certificate(hosts[0], key, ca_key, (names, False), (no_authority, True), (issuer, False))


def alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def private_bytes(key: Key, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def make(folder: Path, hosts: list[str], nodes: list[str]) -> None:
    """Write all files into `folder`, or none.

    Raises:
        FileExistsError: if one of them is there.
        ValueError: for a host that is no name in ASCII (write münchen.de as xn--mnchen-3ya.de).
    """
    files: dict[str, bytes] = {}
    if hosts:
        key, ca_key = new_key(), new_key()
        here = ("localhost", "127.0.0.1")  # the SuperLink's own processes connect to it on this machine
        server = for_server(list(dict.fromkeys([*hosts, *here])), key, ca_key)
        files["server.key"] = private_bytes(key, serialization.PrivateFormat.PKCS8)
        files["ca.pem"] = for_authority(ca_key).public_bytes(serialization.Encoding.PEM)
        files["server.pem"] = server.public_bytes(serialization.Encoding.PEM)
    for node in nodes:
        pair = new_key()
        public = pair.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        files |= {node: private_bytes(pair, serialization.PrivateFormat.OpenSSH), f"{node}.pub": public + b"\n"}
    for name in files:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists: choose another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        mode = 0o644 if name.endswith((".pem", ".pub")) else 0o600
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", default=[], help="name or address of the SuperLink")
    parser.add_argument("--node", action="append", default=[], help="name of a node's key pair")
    options = parser.parse_args()
    if not options.host and not options.node:
        parser.error("name at least one --host or --node")
    try:
        make(options.folder, options.host, options.node)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {options.folder}: {', '.join(sorted(file.name for file in options.folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

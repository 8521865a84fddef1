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

VALID = timedelta(days=90)


def name_of(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return made.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + VALID)


def authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new certificate authority that signs itself."""
    key, name = ec.generate_private_key(ec.SECP384R1()), name_of("LLM FlowerTune trial authority")
    usage = x509.KeyUsage(
        False, False, False, False, False, True, True, False, False
    )  # signs certificates, nothing else
    made = builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return made.add_extension(usage, critical=True).sign(key, hashes.SHA384()), key


def server_certificate(
    hosts: list[str], ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for a server that is reached under `hosts`, names or IP addresses."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([alternative(host) for host in hosts])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    made = builder(name_of(hosts[0]), ca.subject, key).add_extension(names, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    return made.add_extension(issuer_key, critical=False).sign(ca_key, hashes.SHA384()), key


def alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write_new(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def make(folder: Path, hosts: list[str], nodes: list[str]) -> None:
    """Write all files into `folder`, or none.

    Raises:
        FileExistsError: if one of them is there.
        ValueError: for a host that is no name in ASCII (write münchen.de as xn--mnchen-3ya.de).
    """
    files: dict[str, bytes] = {}
    if hosts:
        ca, ca_key = authority()
        # the SuperLink's own processes connect to it on this machine
        certificate, key = server_certificate(list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"])), ca, ca_key)
        files["server.key"] = private_bytes(key, serialization.PrivateFormat.PKCS8)
        files["ca.pem"] = ca.public_bytes(serialization.Encoding.PEM)
        files["server.pem"] = certificate.public_bytes(serialization.Encoding.PEM)
    for node in nodes:
        pair = ec.generate_private_key(ec.SECP384R1())
        public = pair.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        files[node] = private_bytes(pair, serialization.PrivateFormat.OpenSSH)
        files[f"{node}.pub"] = public + b"\n"
    for name in files:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists: choose another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_new(folder / name, content, 0o644 if name.endswith((".pem", ".pub")) else 0o600)


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

"""python -m deployment.certificates FOLDER --host NAME_OR_ADDRESS ... [--node NAME ...]

Makes what a federation over TLS with node authentication needs, for tests and trials: a certificate
authority (ca.pem), the SuperLink's certificate for the given hosts (server.pem, server.key), and a key pair
for every node (NAME, NAME.pub). Private keys are readable by this user alone. Valid for 90 days.
"""

import argparse
import ipaddress
import os
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


def write_secret(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def make(folder: Path, hosts: list[str], nodes: list[str]) -> None:
    """Write all files into `folder`. Raises FileExistsError rather than replace a key."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key = authority()
    certificate, key = server_certificate(hosts, ca, ca_key)
    write_secret(folder / "server.key", private_bytes(key, serialization.PrivateFormat.PKCS8))
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    for node in nodes:
        pair = ec.generate_private_key(ec.SECP384R1())
        write_secret(folder / node, private_bytes(pair, serialization.PrivateFormat.OpenSSH))
        public = pair.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"{node}.pub").write_bytes(public + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", required=True)
    parser.add_argument("--node", action="append", default=[])
    options = parser.parse_args()
    make(options.folder, options.host, options.node)
    print(f"written to {options.folder}: {', '.join(sorted(file.name for file in options.folder.iterdir()))}")


if __name__ == "__main__":
    main()

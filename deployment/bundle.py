"""The app bundle that Flower sends with a run: whether it holds the code of this installation, and no other."""

import functools
import hashlib
import io
import zipfile

from utils import SUITE_FOLDER

MOST_BYTES = 50_000_000  # unpacked; Flower allows 10 MB packed


def digest(bundle: bytes) -> str:
    """SHA-256 over names and contents of a bundle's files, sorted; nothing is unpacked to disk.

    What Flower adds (`.info/`) does not count, nor how it is packed. Raises ValueError if it is no bundle, or larger
    than MOST_BYTES.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as packed:
            files = sorted((file for file in packed.infolist() if not file.is_dir()), key=lambda file: file.filename)
            if sum(file.file_size for file in files) > MOST_BYTES:
                raise ValueError(f"the bundle unpacks to more than {MOST_BYTES} bytes")
            lines = [
                f"{hashlib.sha256(packed.read(file)).hexdigest()} {file.filename}\n"
                for file in files
                if not file.filename.startswith(".info/")
            ]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise ValueError("the bundle is no readable archive") from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.cache
def own_digest() -> str:
    """The digest of the bundle that this installation would send."""
    from flwr.cli.build import build_fab_from_disk  # takes a second

    return digest(build_fab_from_disk(SUITE_FOLDER))

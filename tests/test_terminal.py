"""A run does not die of its terminal: a reader that is gone, a full device, a closed stream, another alphabet."""

import os
import subprocess
import sys

import pytest

from utils import SUITE_FOLDER

PROGRAM = """
import sys
from runs.terminal import keep_output
keep_output()
for _ in range(20000):
    print("gr\\u00f6\\u00dfer", flush=True)
    print("b", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_said_is_there_at_once_where_that_is_asked_for(unbuffered):
    code = "import os, sys; from runs.terminal import keep_output; keep_output()\n"
    code += "print('a'); print('b', file=sys.stderr); os._exit(3)"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], cwd=SUITE_FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n" if unbuffered else "", "b\n")


@pytest.mark.parametrize("redirected", ["| head -1", "> /dev/full 2> /dev/full", ">&- 2>&-", "> /dev/null"])
def test_output_that_cannot_be_written_ends_nothing(redirected, tmp_path):
    shell = f"set -o pipefail; {sys.executable} -c '{PROGRAM}' {tmp_path / 'end'} {redirected}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", shell], cwd=SUITE_FOLDER, env=environment, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 0
    assert (tmp_path / "end").read_text() == "done"

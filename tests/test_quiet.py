"""main.log is for people: a round adds as many lines as there is to say, whatever the base model is quantized in."""

import logging

import pytest

from tests.federation import run_locally, small
from utils import quiet_transformers

MOST = 40  # lines of a run of one round with two clients: settings, clients, warnings of libraries, the round itself


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["none", "8", "4"])
def test_a_round_writes_few_lines_into_the_log(bits, tmp_path, monkeypatch):
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    level = root.level
    root.setLevel(logging.INFO)
    try:
        quiet_transformers()
        run_locally(small(f"model.quantization={bits}", "num_rounds=1"), tmp_path)
    finally:
        root.setLevel(level)
        logging.captureWarnings(False)
    assert any("round 1" in line for line in lines)
    assert len(lines) <= MOST, lines

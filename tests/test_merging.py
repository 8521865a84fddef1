"""test.py --merge takes a layer and a shard of memory, however large the model is."""

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from learning import merging
from settings.schema import SettingsError
from utils import SUITE_FOLDER

SHAPE = dict(hidden_size=2048, num_hidden_layers=10, intermediate_size=5632, num_attention_heads=16)  # 519 million


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path]:
    """A base model in bfloat16 and an adapter in all of its linear layers."""
    base, adapter = (tmp_path_factory.mktemp("large") / name for name in ("base", "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(SUITE_FOLDER / "quickstart/model")
    shape = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", base_model_name_or_path=str(base))
    get_peft_model(model, lora).save_pretrained(adapter)
    return base, adapter


def most(process: subprocess.Popen, *fields: str) -> dict[str, int]:
    """The largest values of these fields of /proc/PID/status, in bytes, until the process ends."""
    seen = dict.fromkeys(fields, 0)
    while process.poll() is None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        for field in fields:
            found = re.search(rf"{field}:\s+(\d+)", text)
            seen[field] = max(seen[field], int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_merging_takes_at_most_twice_the_memory_of_its_file_and_what_it_said(large, kind, tmp_path):
    base, adapter = large
    command = [sys.executable, "test.py", f"--peft-path={adapter}", f"--base={base}", f"--merge={tmp_path / 'out'}"]
    run = subprocess.Popen(
        [*command, f"--merge-dtype={kind}"],
        cwd=SUITE_FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = most(run, "VmHWM", "RssAnon")
    said = run.stdout.read()
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert run.returncode == 0
    assert peak["VmHWM"] < 2 * size
    need = re.search(r"needs about ([\d.]+) MB of memory", said)
    assert need, said
    assert peak["RssAnon"] < 1.1 * float(need[1]) * 1e6


def test_merging_that_the_disk_has_no_room_for_is_refused_before(monkeypatch, tmp_path):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(SettingsError, match=r"needs about 1.* of memory, and 2.0 GB of disk .* has 1.0 GB left"):
        merging.check_room(tmp_path / "new" / "folder", [25_000_000] * 10, torch.float32)

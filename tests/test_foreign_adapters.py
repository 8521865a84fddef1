"""Adapters that PEFT wrote elsewhere: in test.py they are what plain transformers and PEFT make of them by hand."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import model as adapters
import test as cli
from learning import answering, merging, tuned
from runs.runfolder import find_checkpoint
from settings.schema import SettingsError
from tests.federation import small
from tests.hub.repositories import build
from utils import SUITE_FOLDER, write_digests

TIED = SUITE_FOLDER / "quickstart/model"
PADDED_ROWS = 1344  # of the untied base model: more than its tokenizer has tokens
TEMPLATE = "{{ '<|user|>' + messages[0]['content'] + '<|bot|>' }}"
NEW = ["<|user|>", "<|bot|>", "<|pad|>"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A base model with tied embeddings, and one without whose embeddings are padded."""
    folder = tmp_path_factory.mktemp("bases") / "untied"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=PADDED_ROWS, tie_word_embeddings=False, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TIED).save_pretrained(folder)
    return {"tied": TIED, "untied": folder}


def make_adapter(folder: Path, base_folder: Path, *, new=(), rows=None, pickled=False, saved="auto", **lora) -> Path:
    """What a training with plain PEFT leaves: LoRA, and embeddings that changed as well."""
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    if new:
        tokenizer.add_tokens(list(new), special_tokens=True)
        tokenizer.save_pretrained(folder)
    if rows or new:
        base.resize_token_embeddings(rows or len(tokenizer))
    chosen = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False} | lora
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if not hasattr(layer, "base_layer"):  # under LoRA it is frozen
                layer.weight.add_(0.05 * torch.randn(layer.weight.shape))
    model.save_pretrained(folder, save_embedding_layers=saved, safe_serialization=not pickled)
    return folder


def by_hand(folder: Path, base_folder: Path, rows: int | None = None, dtype=None):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype or adapters.compute_dtype())
    if rows:
        base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, folder).eval()


def options(folder: Path, *extra: str):
    asked = [] if any(option.startswith("--merge") for option in extra) else ["--temperature=0", "--max-new-tokens=8"]
    return cli.parse([f"--peft-path={folder}", *asked, *(extra or ["--question=x"])])


def logits(model, last: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 17, last, 250, last - 1, 33, 900]])).logits[0]


SAVED = {  # what was saved beside LoRA's own tensors, and how many rows the embeddings then have (None: the base's)
    "nothing": ({"saved": False}, None),
    "embeddings": ({"saved": True}, None),
    "more tokens": ({"new": NEW}, 1283),
    "more tokens, padded": ({"new": NEW, "rows": 1408}, 1408),
    "fewer rows": ({"rows": 1280, "saved": True}, 1280),
    "both trained": ({"modules_to_save": ["embed_tokens", "lm_head"], "saved": False}, None),
    "head trained": ({"modules_to_save": ["lm_head"], "saved": False}, None),
    "both trained, more tokens": ({"new": NEW, "modules_to_save": ["embed_tokens", "lm_head"]}, 1283),
    "LoRA on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
    "LoRA on both, more tokens": ({"new": NEW, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 1283),
    "new tokens trained": ({"trainable_token_indices": [5, 1279], "saved": False}, None),
    "tied and trained": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "saved": False}, None),
    "LoRA on the head": ({"target_modules": ["v_proj", "lm_head"], "saved": False}, None),
    "DoRA and biases": ({"use_dora": True, "bias": "lora_only", "saved": False}, None),
    "pickle": ({"new": NEW, "pickled": True}, 1283),
}


@pytest.fixture(scope="module")
def saved_adapter(bases, tmp_path_factory):
    made: dict[tuple[str, str], Path] = {}

    def make(base: str, case: str) -> Path:
        if (base, case) not in made:
            made[base, case] = make_adapter(tmp_path_factory.mktemp("adapter"), bases[base], **SAVED[case][0])
        return made[base, case]

    return make


IN_SHORT = [  # the others are slow together
    ("tied", "embeddings"),
    ("untied", "fewer rows"),
    ("tied", "both trained, more tokens"),
    ("untied", "LoRA on both, more tokens"),
    ("tied", "pickle"),
]
CASES = [
    pytest.param(base, case, marks=[] if (base, case) in IN_SHORT else pytest.mark.slow)
    for case in SAVED
    for base in ("tied", "untied")
]


@pytest.mark.parametrize(("base", "case"), CASES)
def test_logits_are_those_of_plain_peft_loading(base, case, bases, saved_adapter):
    folder, rows = saved_adapter(base, case), SAVED[case][1]
    answerer = answering.Answerer(folder, options(folder))
    known = AutoModelForCausalLM.from_pretrained(bases[base], dtype=adapters.compute_dtype()).eval()
    last = len(answerer.tokenizer) - 1
    found = logits(answerer.model, last)
    assert torch.equal(found, logits(by_hand(folder, bases[base], rows), last))
    with answerer.model.disable_adapter():  # the base model alone, as --compare asks it
        alone = logits(answerer.model, 1279)
    shared = min(len(alone[0]), len(logits(known, 1279)[0]))
    assert torch.equal(alone[:, :shared], logits(known, 1279)[:, :shared])
    assert not torch.equal(found[:, :shared], alone[:, :shared])


@pytest.mark.parametrize(("base", "case"), CASES)
def test_merged_model_equals_adapter_on_its_base(base, case, bases, saved_adapter, tmp_path):
    folder, rows = saved_adapter(base, case), SAVED[case][1]
    cli.run(options(folder, f"--merge={tmp_path / 'merged'}"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    last = len(AutoTokenizer.from_pretrained(tmp_path / "merged")) - 1
    assert last == 1279 + 3 * ("new" in SAVED[case][0])
    difference = logits(merged, last) - logits(by_hand(folder, bases[base], rows, torch.float32), last)
    assert difference.abs().max() < 1e-4


def test_a_new_token_without_an_embedding_leaves_the_others_alone(bases, tmp_path):
    """As a padding token that was added and never trained: the tokenizer has one more, the adapter no embeddings."""
    folder = make_adapter(tmp_path / "adapter", TIED, saved=False)
    tokenizer = AutoTokenizer.from_pretrained(TIED)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    answerer = answering.Answerer(folder, options(folder))
    assert answerer.prompt([{"role": "user", "content": "", "input": ""}])
    found = logits(answerer.model, 1279)
    assert found.shape[-1] == 1281
    assert torch.equal(found[:, :1280], logits(by_hand(folder, TIED), 1279))
    assert (found[:, 1280] < found.max(-1).values).all()  # it is never the answer


def test_prompts_are_made_with_the_adapters_own_tokenizer(saved_adapter, tmp_path):
    folder = saved_adapter("tied", "more tokens")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    answerer = answering.Answerer(folder, options(folder, "--question=x", f"--template={tmp_path / 'own.jinja'}"))
    own = AutoTokenizer.from_pretrained(folder)
    ids = answerer.prompt([{"role": "user", "content": "Hello", "input": ""}])
    assert ids[0] == own.convert_tokens_to_ids("<|user|>") == 1280
    assert ids == own("<|user|>Hello<|bot|>", add_special_tokens=False)["input_ids"]


# --- where the base model lies --------------------------------------------------------------------


def named_base(folder: Path, name) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    saved = json.loads((folder / "adapter_config.json").read_text())
    return tuned.base_settings(saved, folder, options(folder)).name


def test_a_merged_model_keeps_settings_of_generation_that_transformers_would_write():
    sound = merging.generation_settings(GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2), [2, 3])
    assert (sound.temperature, sound.eos_token_id) == (0.6, [2, 3])
    torn = merging.generation_settings(GenerationConfig(temperature=0.9, top_p=0.6, bos_token_id=1), [2])
    torn.validate(strict=True)
    assert (torn.temperature, torn.bos_token_id, torn.eos_token_id) == (None, 1, [2])


def test_another_base_can_be_named_and_a_checkpoint_with_more_files_is_whole(bases, tmp_path):
    folder = make_adapter(tmp_path / "adapter", bases["tied"], saved=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "of/nobody", "revision": "v2"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_digests(folder)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")  # as in a copy from the Hub
    (folder / ".cache").mkdir()
    with pytest.raises(SettingsError, match="revision=v2; download that one, and name its folder with --base"):
        cli.run(options(folder))
    named = options(folder, "--question=x", f"--base={bases['tied']}")
    found = tuned.find_tuned(find_checkpoint(str(folder)), named)
    assert found.cfg.name == str(bases["tied"])
    with (folder / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(SettingsError, match=r"damaged \(adapter_config.json\)"):
        find_checkpoint(str(folder))


def test_a_base_with_python_code_of_its_own_needs_trust(tmp_path):
    build(tmp_path, "tests/custom-code")
    base = tmp_path / "models/tests/custom-code"
    cfg = small(f"model.name={base}", "model.trust_remote_code=true").model
    with pytest.raises(SettingsError, match="brings Python code of its own.*model.trust_remote_code=true"):
        adapters.read_config(small(f"model.name={base}").model)
    lora, shapes = adapters.adapter_plan(cfg, adapters.read_config(cfg))
    adapters.save_adapter(tmp_path / "adapter", adapters.initial_adapter(shapes, lora, 0), lora, TEMPLATE)
    with pytest.raises(SettingsError, match="brings Python code of its own.*set --trust-remote-code"):
        cli.run(options(tmp_path / "adapter"))
    answerer = answering.Answerer(
        tmp_path / "adapter", options(tmp_path / "adapter", "--trust-remote-code", "--question=x")
    )
    assert torch.isfinite(logits(answerer.model, 1000)).all()


def test_a_relative_base_is_looked_for_here_then_where_the_adapter_lies(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "adapter", there):
        folder.mkdir(exist_ok=True, parents=True)
    monkeypatch.chdir(here)
    adapter = there / "adapter"
    assert named_base(adapter, "my/base") == "my/base"  # a name on the Hub
    (there / "my/base").mkdir(parents=True)
    assert Path(named_base(adapter, "my/base")) == there / "my/base"
    assert Path(named_base(adapter, "../my/base")).resolve() == there / "my/base"
    (adapter / "my/base").mkdir(parents=True)
    assert Path(named_base(adapter, "my/base")) == adapter / "my/base"
    (here / "my/base").mkdir(parents=True)
    assert named_base(adapter, "my/base") == "my/base"
    assert named_base(adapter, "quickstart/model") == "quickstart/model"  # which the suite ships
    monkeypatch.chdir(there)
    assert Path(named_base(Path("adapter"), "my/base")) == Path("my/base")


def test_adapter_beside_its_base_answers_from_any_working_folder(bases, saved_adapter, tmp_path, monkeypatch, capsys):
    shutil.copytree(saved_adapter("untied", "embeddings"), tmp_path / "run/adapter")
    shutil.copytree(bases["untied"], tmp_path / "run/base")
    edit(tmp_path / "run/adapter", base_model_name_or_path="../base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ask("../run/adapter", monkeypatch) == 0
    assert not capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ask(folder, monkeypatch, *extra: str) -> int:
    arguments = [f"--peft-path={folder}", *(extra or ["--question=x", "--temperature=0", "--max-new-tokens=4"])]
    monkeypatch.setattr(sys, "argv", ["test.py", *arguments])
    return cli.main()


def refusal(folder, monkeypatch, capsys, *extra: str) -> str:
    """The one line with which test.py refuses an adapter."""
    assert ask(folder, monkeypatch, *extra) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --peft-path=")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


@pytest.fixture
def adapter(saved_adapter, tmp_path) -> Path:
    """A copy of an ordinary adapter, to be spoilt."""
    return Path(shutil.copytree(saved_adapter("tied", "nothing"), tmp_path / "adapter"))


@pytest.mark.parametrize("method", [IA3Config(), LoHaConfig(), PrefixTuningConfig(num_virtual_tokens=4)])
def test_other_methods_are_named(method, adapter, monkeypatch, capsys):
    method.base_model_name_or_path = str(TIED)
    method.save_pretrained(adapter)
    assert f"adapter_config.json has peft_type={method.peft_type.value}; only LORA" in refusal(
        adapter, monkeypatch, capsys
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_type": "SEQ_CLS"}, "adapter_config.json has task_type=SEQ_CLS; only CAUSAL_LM"),
        (
            {"base_model_name_or_path": None},
            "adapter_config.json has base_model_name_or_path=None; name the base model with --base",
        ),
        ({"base_model_name_or_path": "org/model", "revision": "step1000"}, "has revision=step1000; download that one"),
        ({"use_future": {"depth": 3}}, "adapter_config.json has use_future={'depth': 3}, which PEFT"),
        ({"r": "eight"}, "adapter_config.json"),
        ({"r": 0}, "adapter_config.json"),
        ({"r": 5}, "does not fit the base model"),
        ({"lora_alpha": None}, "adapter_config.json"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": 7}, "adapter_config.json"),
        ({"rank_pattern": ["q_proj"]}, "adapter_config.json"),
        ({"eva_config": {"rho": "x", "no": 1}}, "adapter_config.json"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron"),
    ],
)
def test_settings_that_cannot_work_get_one_line(changes, words, adapter, monkeypatch, capsys):
    edit(adapter, **changes)
    assert words in refusal(adapter, monkeypatch, capsys)


def test_fields_of_another_version_that_are_off_do_not_matter(adapter, monkeypatch):
    edit(adapter, use_future=None, future_config={}, future=False, runtime_config={"ephemeral_gpu_offload": True})
    assert ask(adapter, monkeypatch) == 0
    kept = json.loads((adapter / "adapter_config.json").read_text())
    old = {"peft_type": "LORA", "base_model_name_or_path": str(TIED), "r": 4, "lora_alpha": kept["lora_alpha"]}
    (adapter / "adapter_config.json").write_text(json.dumps(old | {"target_modules": ["q_proj", "v_proj"]}))
    assert ask(adapter, monkeypatch) == 0  # as PEFT 0.1 wrote it


@pytest.mark.parametrize("text", ["[]", "7", "null", "{", "", '"a"', "\ufeff{}", "[" * 100_000])
def test_settings_that_are_no_object_get_one_line(text, adapter, monkeypatch, capsys):
    (adapter / "adapter_config.json").write_text(text)
    assert "adapter_config.json cannot be read" in refusal(adapter, monkeypatch, capsys)


def test_a_pickle_that_could_run_code_is_not_run(adapter, tmp_path, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": Evil()}, adapter / "adapter_model.bin")
    assert "adapter_model.bin is damaged, or holds more than tensors" in refusal(adapter, monkeypatch, capsys)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", None])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_damaged_weights_get_one_line(name, content, adapter, monkeypatch, capsys):
    (adapter / "adapter_model.safetensors").unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    assert f"{name} " in refusal(adapter, monkeypatch, capsys) or content is None


@pytest.mark.parametrize("found", [[torch.zeros(2)], {"a": 1}, {"a": torch.tensor([float("nan")])}, torch.zeros(3)])
def test_a_pickle_of_something_else_gets_one_line(found, adapter, monkeypatch, capsys):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(found, adapter / "adapter_model.bin")
    assert "adapter_model.bin cannot be read" in refusal(adapter, monkeypatch, capsys)


def test_embeddings_and_tokenizer_of_two_trainings_get_one_line(saved_adapter, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(saved_adapter("untied", "fewer rows"), tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(TIED)
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert "its embeddings have 1280 rows, its tokenizer 1283 tokens" in refusal(folder, monkeypatch, capsys)


@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer_class": "NoSuchTokenizer"}'])
def test_a_tokenizer_that_does_not_load_gets_one_line(text, adapter, monkeypatch, capsys):
    (adapter / "tokenizer_config.json").write_text(text)
    assert "the tokenizer in this folder" in refusal(adapter, monkeypatch, capsys)


def test_a_state_of_something_else_gets_one_line(adapter, monkeypatch, capsys):
    (adapter / "state.json").write_text('{"quantization": 3}')
    assert "state.json has quantization=3; set --quantization" in refusal(adapter, monkeypatch, capsys)
    (adapter / "state.json").write_text("[]")
    assert "state.json cannot be read" in refusal(adapter, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4", "8"])
@pytest.mark.parametrize("case", ["more tokens", "both trained", "LoRA on both, more tokens"])
def test_quantized_bases_take_saved_embeddings(case, quantization, saved_adapter):
    """The embeddings are not quantized: with new ones, answers stay near those of the unquantized base."""
    folder = saved_adapter("tied", case)
    last = 1279 + 3 * ("new" in SAVED[case][0])
    found, whole = (
        logits(answering.Answerer(folder, options(folder, "--question=x", f"--quantization={chosen}")).model, last)
        for chosen in (quantization, "none")
    )
    assert found.shape == whole.shape
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), whole.float().flatten(), 0) > 0.98

"""Adapters without a base model equal PEFT's own; a base model is never changed."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import model as adapters
from server import plan
from settings.compose import compose
from settings.schema import SettingsError
from tests.federation import small

OPEN_LLAMA = {  # name: shapes, bytes of the float32 adapter with r=32 on q_proj and v_proj
    "3b": (dict(hidden_size=3200, num_hidden_layers=26, intermediate_size=8640, num_attention_heads=32), 42_598_400),
    "7b": (dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32), 67_108_864),
}


@pytest.mark.parametrize("size", OPEN_LLAMA)
def test_adapter_built_without_weights_has_peft_keys_shapes_and_bytes(size):
    shape, expected_bytes = OPEN_LLAMA[size]
    base, lora = LlamaConfig(vocab_size=32000, **shape), adapters.lora_config(compose().model)
    adapter = adapters.initial_adapter(
        adapters.adapter_shapes(adapters.empty_model(base, compose().model), lora), lora, seed=0
    )
    with torch.device("meta"):
        peft = get_peft_model(AutoModelForCausalLM.from_config(base), lora)
    expected = {
        name.replace(".default", ""): tuple(weight.shape) for name, weight in peft.named_parameters() if "lora_" in name
    }
    assert {name: array.shape for name, array in adapter.items()} == expected
    assert sum(array.nbytes for array in adapter.values()) == expected_bytes
    assert all(array.dtype == np.float32 for array in adapter.values())


def quickstart(quantization="none", *overrides):
    return small(f"model.quantization={quantization}", *overrides).model


def built(cfg):
    lora = adapters.lora_config(cfg)
    shapes = adapters.adapter_shapes(adapters.empty_model(adapters.read_config(cfg), cfg), lora)
    return lora, shapes, adapters.initial_adapter(shapes, lora, seed=3)


def test_initial_adapter_follows_peft_distribution_and_changes_nothing():
    lora, _, adapter = built(quickstart())
    down = np.concatenate([value.ravel() for name, value in adapter.items() if "lora_A" in name])
    bound = 1 / np.sqrt(256)  # Kaiming uniform with a = sqrt(5): sqrt(6 / (6 * fan_in)), fan_in = hidden size
    assert np.abs(down).max() <= bound
    assert abs(down.std() - bound / np.sqrt(3)) < 0.05 * bound
    assert all(not value.any() for name, value in adapter.items() if "lora_B" in name)


def test_initial_adapter_is_fixed_by_the_seed():
    lora, shapes, adapter = built(quickstart())
    again, other = (adapters.initial_adapter(shapes, lora, seed) for seed in (3, 4))
    assert all(np.array_equal(adapter[name], again[name]) for name in adapter)
    assert not all(np.array_equal(adapter[name], other[name]) for name in adapter)


@pytest.mark.parametrize("quantization", ["4", "8", "none"])
def test_saved_checkpoint_loads_with_peft_and_gives_the_same_logits(quantization, tmp_path):
    cfg = quickstart(quantization)
    lora, _, adapter = built(cfg)
    noise = np.random.default_rng(0)
    adapter = {name: noise.normal(0, 0.05, value.shape).astype(np.float32) for name, value in adapter.items()}
    adapters.save_adapter(tmp_path / "peft_1", adapter, lora, "template")
    ids = torch.arange(3, 30)[None]
    ours = adapters.add_adapter(adapters.load_base(cfg, "cpu"), cfg).eval()
    adapters.set_adapter(ours, adapter)
    theirs = PeftModel.from_pretrained(adapters.load_base(cfg, "cpu"), tmp_path / "peft_1").eval()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(ids).logits, theirs(ids).logits)
    loaded = adapters.load_adapter(tmp_path / "peft_1")
    assert list(loaded) == sorted(adapter)
    assert all(np.array_equal(loaded[name], adapter[name]) for name in adapter)


def test_adapter_that_goes_in_comes_out():
    cfg = quickstart("4", "model.lora.target_modules=all-linear")
    _, shapes, adapter = built(cfg)
    adapter = {name: value + np.float32(0.125) for name, value in adapter.items()}
    model = adapters.add_adapter(adapters.load_base(cfg, "cpu"), cfg)
    adapters.set_adapter(model, adapter)
    back = adapters.get_adapter(model)
    assert list(back) == sorted(shapes)
    assert all(np.array_equal(back[name], adapter[name]) for name in adapter)


def test_quantized_base_is_nf4_with_double_quantization():
    base = adapters.load_base(quickstart("4"), "cpu")
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested
    assert base.model.layers[0].self_attn.q_proj.compute_dtype == adapters.compute_dtype()
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_processors_without_bfloat16_compute_in_float32(monkeypatch):
    for native, kind in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert (adapters.compute_dtype("cpu"), adapters.compute_dtype("cuda")) == (kind, torch.bfloat16)
        base = adapters.load_base(quickstart("4"), "cpu")
        assert base.model.layers[0].self_attn.q_proj.compute_dtype == base.dtype == kind
        assert adapters.load_base(quickstart("none"), "cpu").dtype == kind


def weights_digest(model) -> str:
    """SHA-256 over every tensor of a model, without its adapter."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "lora_" not in name and isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- cache of quantized base models ---------------------------------------------------------------


def logits_of(base) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("quantization", ["4", "8"])
def test_cached_base_model_is_bit_equal_and_rebuilt_when_torn(quantization, tmp_path, caplog):
    cfg = quickstart(quantization, f"model.cache_folder={tmp_path}")
    fresh = logits_of(adapters.load_base(quickstart(quantization), "cpu"))
    assert torch.equal(logits_of(adapters.load_base(cfg, "cpu")), fresh)
    [entry] = tmp_path.iterdir()
    written = (entry / "sha256.json").stat().st_mtime_ns
    cached = adapters.load_base(cfg, "cpu")
    assert torch.equal(logits_of(cached), fresh)
    assert not any(parameter.requires_grad for parameter in cached.parameters())
    assert (entry / "sha256.json").stat().st_mtime_ns == written
    weights = next(entry.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert torch.equal(logits_of(adapters.load_base(cfg, "cpu")), fresh)
    assert "changed since it was written; rebuilt" in caplog.text
    assert adapters.torn_files(entry) == []
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]


def test_cache_of_a_model_that_changed_or_is_quantized_otherwise_is_another(tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree("quickstart/model", copy)
    keys = [adapters.cache_key(quickstart(q, f"model.name={copy}")) for q in ("4", "8")]
    (copy / "model.safetensors").touch()
    assert len({*keys, adapters.cache_key(quickstart("4", f"model.name={copy}"))}) == 3


@pytest.mark.slow
def test_two_processes_may_fill_the_cache_at_the_same_time(tmp_path):
    import subprocess
    import sys

    load = (
        "import sys, model; from settings.compose import compose; "
        "model.load_base(compose(['experiment=quickstart', f'model.cache_folder={sys.argv[1]}']).model)"
    )
    both = [subprocess.Popen([sys.executable, "-c", load, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    [entry] = tmp_path.iterdir()
    assert adapters.torn_files(entry) == []


# --- where LoRA goes, in other people's models ----------------------------------------------------

TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)


def other(name: str):
    """The configuration of a tiny model of another kind."""
    kinds = {
        "phi3": lambda: transformers.Phi3Config(**TINY, pad_token_id=0),
        "pythia": lambda: transformers.GPTNeoXConfig(**TINY),
        "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300),
        "qwen3": lambda: transformers.Qwen3Config(**TINY, head_dim=16),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config=TINY | {"head_dim": 16}, vision_config=VISION | {"patch_size": 14}
        ),
    }
    return kinds[name]()


@pytest.mark.parametrize(
    ("kind", "targets", "tensors"),
    [
        ("phi3", {"qkv_proj"}, 4),  # layers x projections x (A and B)
        ("pythia", {"query_key_value"}, 4),
        ("gpt2", {"c_attn"}, 4),
        ("qwen3", {"q_proj", "v_proj"}, 8),
        ("gemma3", {"q_proj", "v_proj"}, 8),
    ],
)
def test_default_targets_are_the_attention_projections_of_the_language_model(kind, targets, tensors):
    lora, shapes = adapters.adapter_plan(compose().model, other(kind))
    assert lora.target_modules == targets
    assert len(shapes) == tensors
    assert not [name for name in shapes if "vision" in name or "projector" in name]


def test_towers_get_no_adapter_even_where_every_linear_layer_does():
    cfg = compose(["model.lora.target_modules=all-linear"]).model
    _, shapes = adapters.adapter_plan(cfg, other("gemma3"))
    assert {name.split(".")[3] for name in shapes} == {"language_model"}
    assert {name.split(".")[-3] for name in shapes} >= {"q_proj", "down_proj"}


@pytest.mark.parametrize("targets", ["[q_proj]", "[qkv_proj,v_proj]"])
def test_target_that_a_model_lacks_is_answered_with_what_it_has(targets):
    cfg = compose([f"model.lora.target_modules={targets}"]).model
    with pytest.raises(SettingsError, match="no such module; it has down_proj, gate_up_proj, .*o_proj, qkv_proj"):
        adapters.adapter_plan(cfg, other("phi3"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+model.lora.trainable_token_indices=[3]", "trainable_token_indices=.*cannot be trained here"),
        ("+model.lora.ensure_weight_tying=true", "ensure_weight_tying=True: cannot be trained here"),
        ("+model.lora.alora_invocation_tokens=[3]", "alora_invocation_tokens=.*cannot be trained here"),
        ("+model.lora.kasa_config={a:1}", "kasa_config=.*cannot be trained here"),
        ("+model.lora.layer_replication=[[0,2],[1,2]]", "layer_replication=.*cannot be trained here; use one of r, "),
        ("+model.lora.modules_to_save=lm_head", "modules_to_save=lm_head: use a list of module names"),
        ("+model.lora.modules_to_save=[nosuch]", "modules_to_save=nosuch: .*no such module; it has .*embed_tokens"),
        ("+model.lora.exclude_modules=[nosuch]", "exclude_modules=nosuch: .*no such module"),
        ("+model.lora.rank_pattern={nosuch:4}", "rank_pattern=nosuch: .*no such module"),
        ("+model.lora.rank_pattern={q_proj:x}", "rank_pattern=.*: use module names with whole numbers"),
        ("+model.lora.target_parameters=[nosuch]", "target_parameters=nosuch: .*no such parameter"),
        ("model.lora.target_modules=[q_proj,5]", "target_modules=.*: use a list of module names"),
        ("model.lora.bias=xyz", "bias=xyz: use one of none, all, lora_only"),
        ("model.lora.use_rslora=abc", "use_rslora=abc: use true or false"),
        ("+model.lora.layers_to_transform=[99]", "model.lora: "),
    ],
)
def test_lora_options_that_would_train_nothing_are_refused_before_the_start(override, message):
    with pytest.raises(SettingsError, match=message):
        adapters.adapter_plan(small(override).model, adapters.read_config(small().model))


def test_pattern_that_is_no_regular_expression_is_named():
    cfg = small().model
    cfg.lora["alpha_pattern"] = {"q_proj(": 4}
    with pytest.raises(SettingsError, match=r"model.lora.alpha_pattern=q_proj\(: not a valid regular expression"):
        adapters.adapter_plan(cfg, adapters.read_config(cfg))


@pytest.mark.parametrize(
    "override",
    ["model.lora.target_modules=[q_proj,fc1]", "+model.lora.modules_to_save=[multi_modal_projector]"],
)
def test_modules_outside_the_language_part_are_refused(override):
    with pytest.raises(SettingsError, match="no such module; it has"):
        adapters.adapter_plan(compose([override]).model, other("gemma3"))


def test_dora_in_8_bits_is_refused_on_a_cpu_before_the_start_and_in_a_client():
    config = small("model.lora.use_dora=true", "model.quantization=8")
    with pytest.raises(SettingsError, match="model.quantization=8: with model.lora.use_dora=true it needs a GPU"):
        plan.check_names(config)
    with pytest.raises(SettingsError, match="needs a GPU"):
        adapters.add_adapter(adapters.load_base(config.model, "cpu"), config.model)


def test_base_that_cannot_be_built_is_answered_in_one_line():
    base = adapters.read_config(small().model)
    base.hidden_act = "nosuch"
    with pytest.raises(SettingsError, match=r"model.name=\S+: its architecture cannot be loaded \(KeyError: 'nosuch'"):
        adapters.adapter_plan(small().model, base)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_whole_modules_are_trained_in_float32_among_bfloat16_layers(saved, monkeypatch):
    monkeypatch.setattr(adapters, "compute_dtype", lambda device: torch.bfloat16)
    cfg = quickstart("4", f"+model.lora.modules_to_save=[{saved}]")
    model = adapters.add_adapter(adapters.load_base(cfg, "cpu"), cfg)
    kinds = {p.dtype for name, p in model.named_parameters() if p.requires_grad and saved in name}
    assert kinds == {torch.float32}
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.allclose(logits.float(), model(input_ids=ids).logits.float(), atol=0.05)  # bfloat16 rounding
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and saved in name)


# --- bases that are quantized already -------------------------------------------------------------


@pytest.mark.parametrize("bits", ["4", "8"])
def test_base_that_is_stored_quantized_needs_that_setting_and_keeps_its_bits(bits, tmp_path):
    folder = tmp_path / "stored"
    adapters.load_base(quickstart(bits), "cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained("quickstart/model").save_pretrained(folder)
    for asked in {"4", "8", "none"} - {bits}:
        cfg = quickstart(asked, f"model.name={folder}")
        with pytest.raises(SettingsError, match=f"is stored in {bits} bits; set model.quantization={bits}"):
            adapters.read_config(cfg)
    stored = quickstart(bits, f"model.name={folder}")
    assert torch.equal(
        logits_of(adapters.load_base(stored, "cpu")), logits_of(adapters.load_base(quickstart(bits), "cpu"))
    )


def test_base_of_another_quantization_method_is_refused(tmp_path):
    base = adapters.read_config(quickstart())
    base.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SettingsError, match=r"is stored quantized \(gptq\); .*name the unquantized model"):
        adapters.stored_bits("a/b", base)


def test_adapter_beside_a_base_model_is_not_put_in_silently(tmp_path):
    shutil.copytree("quickstart/model", tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text("{}")
    with pytest.raises(SettingsError, match="an adapter lies beside the model.*move adapter_config.json out of"):
        adapters.read_config(quickstart("none", f"model.name={tmp_path / 'model'}"))


@pytest.mark.parametrize("saved", ["k_proj", "mlp"])
def test_quantized_layer_cannot_be_trained_whole(saved):
    lora = f"+model.lora.modules_to_save=[{saved}]"
    with pytest.raises(SettingsError, match=f"modules_to_save={saved}: .* is quantized"):
        adapters.adapter_plan(quickstart("4", lora), adapters.read_config(quickstart("4")))
    assert adapters.adapter_plan(quickstart("none", lora), adapters.read_config(quickstart()))


@pytest.mark.parametrize("kind", ["t5", "qwen2_5_vl"])
def test_model_that_is_no_causal_language_model_is_refused(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=f"no causal language model of the kind {kind}; name a text model"):
        adapters.described(quickstart("none", f"model.name={tmp_path}"), tmp_path)


def test_tokenizer_of_another_model_is_refused():
    tokenizer = AutoTokenizer.from_pretrained("quickstart/model")
    adapters.check_tokenizer("a/b", tokenizer, len(tokenizer))
    with pytest.raises(SettingsError, match=f"model.name=a/b: its tokenizer knows {len(tokenizer)} tokens, the model"):
        adapters.check_tokenizer("a/b", tokenizer, 2 * len(tokenizer) + 1)
    with pytest.raises(SettingsError, match="its tokenizer makes token"):
        adapters.check_tokenizer("a/b", tokenizer, 300)
    with pytest.raises(SettingsError, match=f"its tokenizer makes token {len(tokenizer) - 1}, the model has"):
        adapters.check_tokenizer("a/b", tokenizer, len(tokenizer) - 1)


def test_weights_of_another_shape_are_named(tmp_path):
    shutil.copytree("quickstart/model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    cfg = small(f"model.name={tmp_path / 'model'}").model
    with pytest.raises(SettingsError, match=r"of another model than its config.json describes: \S+mlp\S+ is \("):
        adapters.load_weights(cfg, torch.float32, "cpu")


def test_weights_that_lack_tensors_or_are_torn_get_one_line(tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "model"
    shutil.copytree("quickstart/model", copy)
    cfg, file = quickstart("none", f"model.name={copy}"), copy / "model.safetensors"
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if "layers.1." not in name}, file, {"format": "pt"})
    with pytest.raises(SettingsError, match=r"its weights lack \d+ tensors, such as model.layers.1"):
        adapters.load_base(cfg, "cpu")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SettingsError, match="its weights cannot be loaded") as raised:
        adapters.load_base(cfg, "cpu")
    assert "\n" not in str(raised.value)


def test_adapter_of_a_local_model_notes_a_path_that_holds_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    noted = {"mine": str(tmp_path / "mine"), "quickstart/model": "quickstart/model", "owner/name": "owner/name"}
    for name, expected in noted.items():
        lora = adapters.lora_config(small(f"model.name={name}").model)
        assert lora.base_model_name_or_path == expected

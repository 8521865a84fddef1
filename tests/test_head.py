"""The head where a label is gives the loss and the gradients of full logits, for every way to make logits."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import model as adapters
from learning import head
from learning.training import collate

SHAPES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "LLaMA": ("Llama", {}, {}),
    "soft-capped": ("Gemma2", {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}, {}),
    "divided": ("Granite", {"logits_scaling": 3.0}, {}),
    "multiplied": ("Cohere", {"logit_scale": 0.3}, {}),
    "with a bias": ("Phi", {}, {}),
    "another name": ("GPTNeoX", {}, {"target_modules": ["query_key_value"]}),
    "tied": ("Llama", {"tie_word_embeddings": True}, {}),
    "LoRA in the head": ("Llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA in the head alone": ("Gemma2", {"tie_word_embeddings": False}, {"target_modules": ["lm_head"]}),
    "head trained whole": ("Granite", {"logits_scaling": 3.0}, {"modules_to_save": ["lm_head"]}),
    "tied, embeddings trained whole": ("Gemma2", {}, {"modules_to_save": ["embed_tokens"]}),
}


def tiny(kind, shapes, lora):
    """A model of that kind with an adapter that does something, in float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPES | shapes)
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    chosen = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.0} | lora
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen)).double()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return model.train()


def rows_of(*lengths):
    """Rows of these lengths whose first third is no answer, and one in whose middle there is a gap."""
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        labels[length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def of_full_logits(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model, loss):
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), materialize_grads=True), strict=True))


@pytest.mark.parametrize("at_once", [1000, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_full_logits(kind, at_once, monkeypatch):
    monkeypatch.setattr(head, "positions_at_once", lambda *_: at_once)
    model, batch = tiny(*KINDS[kind]), collate(rows_of(20, 13, 6))
    found, expected = head.labelled(model, batch).loss(), of_full_logits(model, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def seeing():
    """A model with a vision tower, whose decoder is not its first part."""
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=SHAPES | {"query_pre_attn_scalar": 8},
            vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4, image_token_index=290, boi_token_index=291, eoi_token_index=292,
        )
    )  # fmt: skip


def old():
    """GPT-2, whose decoder and layers have other names."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def nested():
    """OPT, whose head goes past the base model to the decoder inside."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, dropout=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [seeing, old, nested])
def test_other_layouts_have_the_loss_of_full_logits_too(make):
    torch.manual_seed(0)
    model, batch = make().double().train(), collate(rows_of(20, 13))
    found = head.labelled(model, batch).loss()
    torch.testing.assert_close(found, of_full_logits(model.eval(), batch), rtol=1e-9, atol=0)


def test_a_mixture_of_experts_keeps_what_balances_its_load():
    model = tiny("Mixtral", {"num_local_experts": 4, "output_router_logits": True}, {}).float()  # has no float64
    batch = collate(rows_of(20, 13))
    found = head.labelled(model, batch, output_router_logits=True)
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"], output_router_logits=True)
    torch.testing.assert_close(found.auxiliary(), expected.aux_loss)
    assert found.auxiliary().requires_grad


def test_only_labelled_positions_go_through_the_head():
    model, batch, seen = tiny(*KINDS["LLaMA"]), collate(rows_of(20, 13, 6)), []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    head.labelled(model, batch).loss().backward()
    assert sum(seen) == (batch["labels"][:, 1:] != -100).sum()


def test_rows_without_labels_have_no_loss_and_no_gradient():
    model, batch = tiny(*KINDS["LLaMA"]), collate([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])
    loss = head.labelled(model, batch).loss()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("vocabulary", [1_300, 32_000, 128_000, 256_000])
def test_a_piece_takes_no_more_memory_than_a_layer(vocabulary):
    shapes = transformers.LlamaConfig(vocab_size=vocabulary, hidden_size=4096, intermediate_size=11008)
    size = head.positions_at_once(shapes, 16 * 512)
    assert size * vocabulary * 6 <= 16 * 512 * (12 * 4096 + 8 * 11008)
    assert size > 500
    assert head.positions_at_once(shapes, 1) == head.LEAST_AT_ONCE


def test_of_layers_with_widths_of_their_own_the_widest_counts():
    shapes = transformers.Gemma3nTextConfig()
    shapes.intermediate_size = [64, 128, 96]
    assert head.inner_width(shapes) == 128


def test_an_adapter_in_bfloat16_arithmetic_is_close_to_float32():
    model, batch = tiny(*KINDS["LoRA in the head"]).float(), collate(rows_of(20, 13, 6))
    exact = head.labelled(model, batch).loss()
    low = tiny(*KINDS["LoRA in the head"]).to(torch.bfloat16)
    for weight in low.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    with adapters.arithmetic(low):
        found = head.labelled(low, batch).loss()
    assert found.dtype == torch.float32
    found.backward()
    assert all(weight.grad.dtype == torch.float32 for weight in low.parameters() if weight.requires_grad)
    assert found.item() == pytest.approx(exact.item(), rel=0.03)

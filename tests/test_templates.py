"""Tokenizers and chat templates of other people's models: nothing of a row becomes special, one end, one date."""

import datetime
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer

import model as adapters
from data.forms import Conversation
from data.templates import DATE_CODES, TODAY, on_one_day, own_template
from data.tokens import encode_row
from dataset import encode_prompt, end_ids, read_template
from settings.compose import compose
from settings.schema import SettingsError
from tests.hub.repositories import build

CHAT = {  # repository: what ends an answer
    "meta-llama/Llama-3.2-1B-Instruct": "<|eot_id|>",
    "meta-llama/Llama-2-7b-chat-hf": "</s>",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "</s>",
    "google/gemma-3-1b-it": "<end_of_turn>",
    "microsoft/Phi-3-mini-4k-instruct": "<|end|>",
    "Qwen/Qwen2.5-0.5B-Instruct": "<|im_end|>",
    "mistralai/Mistral-7B-Instruct-v0.3": "</s>",
}
QUESTION, ANSWER = "Name a colour, please.", "It is dark red."


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build(folder, *CHAT, "tests/named-templates", "tests/no-tokenizer")
    return folder / "models"


@pytest.fixture(params=CHAT)
def chat(request, root):
    """A tokenizer, its own template, and what ends its answers."""
    tokenizer = AutoTokenizer.from_pretrained(root / request.param)
    return tokenizer, own_template(tokenizer), CHAT[request.param]


def encoded(tokenizer, template, question=QUESTION, answer=ANSWER):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt, response = encode_row(tokenizer, template, Conversation(turns), 4096, "all").parts
    assert prompt.ids == encode_prompt(tokenizer, template, turns[:1])
    return prompt.ids, response.ids


def test_prompt_and_response_are_the_tokens_of_the_whole_conversation(chat):
    tokenizer, template, _ = chat
    prompt, response = encoded(tokenizer, template)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt) + len(response)] == prompt + response


def test_answer_ends_once_with_the_models_own_token_and_nothing_behind_it(chat):
    tokenizer, template, end = chat
    _, response = encoded(tokenizer, template)
    assert tokenizer.convert_ids_to_tokens(response[-1]) == end
    assert sum(token in end_ids(tokenizer) for token in response) == 1
    assert tokenizer.decode(response[:-1]).strip() == ANSWER


def test_no_text_of_a_row_becomes_a_special_token(chat):
    tokenizer, template, _ = chat
    spelled = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(spelled) > 2
    trap = "a" + "b".join(spelled[:12] + spelled[-12:]) + "c"
    prompt, response = encoded(tokenizer, template, f"Say {trap}.", f"Well: {trap}!")
    plain = encoded(tokenizer, template)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for found, harmless in zip((prompt, response), plain, strict=True):
        assert [t for t in found if t in special] == [t for t in harmless if t in special]
    assert trap in tokenizer.decode(response)
    assert trap in tokenizer.decode(prompt)


def test_every_day_has_the_same_tokens(root, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(root / "meta-llama/Llama-3.2-1B-Instruct")
    template = own_template(tokenizer)
    assert "strftime_now" in template
    days = []
    for day in (1, 2):

        class Moment(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2030, 1, day)  # noqa: B023

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Moment)
        days.append(encoded(tokenizer, template))
    assert days[0] == days[1]
    assert "26 Jul 2024" in tokenizer.decode(days[0][0])


@pytest.mark.parametrize("code", DATE_CODES)
def test_every_form_of_the_date_is_the_same_day(code):
    template = on_one_day("\n{{ strftime_now('<%" + code + ">') }}")
    written = jinja2.Environment(trim_blocks=True).from_string(template).render()  # noqa: S701  as transformers has it
    assert written == "\n" + TODAY.strftime(f"<%{code}>")


def test_of_several_templates_the_default_one_is_used(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "tests/named-templates")
    assert isinstance(tokenizer.chat_template, dict)
    settings = compose(["dataset.template=tokenizer"]).dataset
    assert read_template(settings, tokenizer) == tokenizer.chat_template["default"]
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(SettingsError, match="chat templates rag, tool_use and none of them is called default"):
        read_template(settings, tokenizer)


def test_tokenizer_that_knows_next_to_nothing_is_refused(root):
    cfg = compose([f"model.name={root}/tests/no-tokenizer"]).model
    with pytest.raises(SettingsError, match=r"its tokenizer (knows \d+ tokens, the model \d+|cannot be loaded)"):
        adapters.read_tokenizer(cfg)

"""Chat templates: which one, what it makes of a conversation, and its special tokens, which no row's text becomes."""

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from settings.schema import CONFIG_FOLDER, DatasetConfig, SettingsError
from utils import local_path, shipped_path, shortened

TEMPLATE_FOLDER = CONFIG_FOLDER / "template"
DAY = "{%- macro strftime_now(format) %}{{ FORMAT }}{% endmacro %}"  # in front of a template, stands for the real one
DATE_CODES = ("-d", "-H", "-I", "-m", "-M", "-S", *"aAbBcdDeFhHIjmMpSTuxXyY")  # of strftime
TODAY = date(2024, 7, 26)  # for templates that write the date: each day of a run and its resume has the same tokens
MARKS = re.compile("[\U000f0000\U000f0001]")  # with which transformers tells a row's text from special tokens


def read_template(cfg: DatasetConfig, tokenizer: Tokenizer) -> str:
    """The Jinja chat template that `dataset.template` names. Raises SettingsError if there is none of that name."""
    if cfg.template == "tokenizer":
        if own := own_template(tokenizer):
            return own
        raise SettingsError("dataset.template=tokenizer: this model's tokenizer has no chat template; use alpaca")
    try:
        return on_one_day(find_template(cfg.template).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"dataset.template={cfg.template}: not a text file") from error


def own_template(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat template, of several the one called `default`; None if it has none."""
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return named and on_one_day(named)
    if "default" not in named:
        raise SettingsError(
            f"dataset.template=tokenizer: this model has the chat templates {', '.join(sorted(named))} and none "
            "of them is called default; save the one you want as a Jinja file and give its path"
        )
    return on_one_day(str(named["default"]))


def on_one_day(template: str) -> str:
    """`template`, if it writes today's date, with TODAY in its place: also for whoever loads it with the adapter."""
    if "strftime_now" not in template or template.startswith(DAY[:20]):
        return template
    written = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in DATE_CODES)
    return DAY.replace("FORMAT", f"format{written}") + "\n" + template  # the line break is trimmed, as after any block


def find_template(name: str) -> Path:
    """The file of a template of conf/template, or of the user's own."""
    path = shipped_path(f"conf/template/{name}.jinja") or local_path(name)
    if path is None or not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja")))
        raise SettingsError(f"dataset.template={name}: use {known}, tokenizer, or the path of a Jinja file")
    return path


@functools.lru_cache(maxsize=4)
def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's EOS, and those that the model's own files name beside it."""
    ends: set[int] = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            named = json.loads((Path(tokenizer.name_or_path) / file).read_text(encoding="utf-8")).get("eos_token_id")
            ends |= {named} if isinstance(named, int) else set(named or [])
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(end for end in ends if end in special or end == tokenizer.eos_token_id)


def render(
    tokenizer: Tokenizer, template: str, turns: Sequence[Mapping[str, Any]], tools: Any = None, *, for_response: bool
) -> str:
    """The template's text, with marks on special tokens that a user spelled out. Raises jinja2.TemplateError."""
    pattern = special_tokens(tokenizer)
    safe = mark_control_tokens([dict(turn) for turn in turns], pattern)
    more = {"tools": mark_control_tokens(tools, pattern)} if tools else {}
    text = tokenizer.apply_chat_template(
        safe, chat_template=template, tokenize=False, add_generation_prompt=for_response, **more
    )
    return str(text)


def marked(tokenizer: Tokenizer, text: str) -> str:
    """Text of a row as it stands in what `render` returns."""
    return str(mark_control_tokens(text, special_tokens(tokenizer)))


@functools.lru_cache(maxsize=4)
def end_marks(tokenizer: Tokenizer) -> re.Pattern[str]:
    """How what ends an answer is spelled in rendered text, where it is no text of a row."""
    spelled = sorted(tokenizer.convert_ids_to_tokens(sorted(end_ids(tokenizer))), key=len, reverse=True)
    return re.compile("(?<!\U000f0000)(?:" + "|".join(map(re.escape, spelled)) + ")")


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """How the tokenizer's special tokens are spelled; those in no named role, such as <|start_header_id|>, included."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def lead_of(tokenizer: Tokenizer, prompt: str) -> str:
    """What the tokens of a response depend on: the special token that a prompt ends with, or just that there is text.

    A SentencePiece tokenizer puts a blank before whatever it is given, and some before what follows a special token.
    """
    last = max(special_tokens(tokenizer).finditer(prompt), key=lambda found: found.start(), default=None)
    return "\n" if last is None or prompt[last.end() :].strip() else prompt[last.start() :]


def encode_text(tokenizer: Tokenizer, text: str, lead: str = "") -> list[int]:
    """Token ids of rendered text: the template's special tokens are special, marked ones are plain text.

    `lead` stands before the text, and is not returned; where its tokens run into the text's, the text stands alone.
    """
    try:
        before, ids = (encode_marked_chat(tokenizer, part) if part else [] for part in (lead, lead + text))
        return ids[len(before) :] if ids[: len(before)] == before else encode_marked_chat(tokenizer, text)
    except ValueError as error:
        raise SettingsError(f"a row cannot become tokens: {shortened(error, 200)}; remove that text") from error

"""Vocabularies of the test repositories: SentencePiece and byte-level BPE, each trained once and laid out as wanted."""

import functools
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.hub.text import corpus

TRAINED_PIECES = 1900
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a SentencePiece piece
SPACE = "▁"

LLAMA_HEAD = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
"""The first pieces of LLaMA's vocabulary; byte and trained pieces follow."""

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# ----------------------------------------------------------------------------- SentencePiece


@functools.cache
def trained_pieces() -> ModelProto:
    """A BPE model with byte fallback: <unk>, <s>, </s>, 256 bytes, pieces by rank, characters."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=written, vocab_size=TRAINED_PIECES, model_type="bpe",
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return ModelProto.FromString(written.getvalue())


def sentencepiece_model(
    head: dict[str, int] = LLAMA_HEAD, *, size: int = 0, ids: dict[str, int] | None = None, dummy_prefix: bool = True
) -> ModelProto:
    """The trained model with another `head` (pieces and their types), filled up to `size` with pieces that no text has.

    `ids` are the places of unk, bos, eos and pad in the head (default: LLaMA's).
    """
    model = ModelProto.FromString(trained_pieces().SerializeToString())
    trained = list(model.pieces)[len(LLAMA_HEAD) :]
    del model.pieces[:]
    for piece, kind in head.items():
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.pieces.extend(piece for piece in trained if piece.piece not in head)
    lowest = min(piece.score for piece in trained)
    for number, piece in enumerate(made_up_words(size - len(model.pieces)), 1):
        model.pieces.add(piece=piece, score=lowest - number, type=NORMAL)
    for name, index in (ids or {}).items():
        setattr(model.trainer_spec, f"{name}_id", index)
        if index >= 0:
            setattr(model.trainer_spec, f"{name}_piece", model.pieces[index].piece)
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    return model


def made_up_words(count: int) -> Iterable[str]:
    """Different words that no language has: SPACE and three syllables with a capital in the middle."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvwxz" for vowel in "aeiou"]
    words = (f"{SPACE}{a}{b}{c.upper()}" for a, b, c in itertools.product(syllables, repeat=3))
    return itertools.islice(words, max(0, count))


def merges_of(model: ModelProto) -> list[tuple[str, str]]:
    """The merges that give a model's pieces, in the order of their ranks (as transformers converts them)."""
    mergeable = (NORMAL, USER_DEFINED)  # Gemma's runs of blanks and line breaks are user-defined
    ranks = {piece.piece: rank for rank, piece in enumerate(model.pieces) if piece.type in mergeable}
    merges = []
    for piece in ranks:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def sentencepiece_json(model: ModelProto, bos: str = "<s>") -> Tokenizer:
    """The `tokenizer.json` that belongs to a `tokenizer.model`; control and user-defined pieces are added tokens."""
    ranks = {piece.piece: rank for rank, piece in enumerate(model.pieces)}
    bpe = models.BPE(vocab=ranks, merges=merges_of(model), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
            for piece in model.pieces
            if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", SPACE)
    if model.normalizer_spec.add_dummy_prefix:  # LLaMA
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        to_text.append(decoders.Strip(" ", 1, 0))
    else:  # Gemma
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.post_processor = starting_with(bos, ranks[bos])
    return tokenizer


def starting_with(bos: str, index: int) -> processors.TemplateProcessing:
    """Every text starts with a token."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


# ----------------------------------------------------------------------------- byte-level BPE


@functools.cache
def trained_bytes() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens by rank and the merges of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_at(GPT2_SPLIT)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TRAINED_PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def split_at(pattern: str) -> pre_tokenizers.Sequence:
    """Split a text at a regular expression, then into bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def byte_level_json(
    split: str, *, first: Sequence[str] = (), special: Sequence[str] = (), ordinary: Sequence[str] = ()
) -> Tokenizer:
    """A `tokenizer.json` of byte-level BPE.

    Special tokens stand `first` in the vocabulary or (`special`) at its end. The `ordinary` added tokens that follow
    count as text: a decoder keeps them.
    """
    tokens, merges = trained_bytes()
    vocabulary = {token: index for index, token in enumerate([*first, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = split_at(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in [*first, *special]])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ordinary])
    return tokenizer


def added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The entry `added_tokens_decoder` of a tokenizer_config.json."""
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    found = tokenizer.get_added_tokens_decoder()
    return {str(index): {key: getattr(token, key) for key in keys} for index, token in sorted(found.items())}

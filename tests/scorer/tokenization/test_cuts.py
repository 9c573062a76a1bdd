"""Cuts are exact: parts tokenized on their own give the whole's tokens, for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from kvatlas.scorer.tokenization import cuts
from kvatlas.scorer.tokenization import encoder as encoder_module
from kvatlas.scorer.tokenization.encoder import Encoder
from kvatlas.scorer.tokenization.files import ModelFiles
from kvatlas.scorer.tokenization.text_cache import TextCache

ALPHABET = "ab zQ09'.,!-_\n\t\u00a0é\u0301ßИ字😀<|>[]▁ \r"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im|>", "[INST]"]
WORDS = [
    "the cache",
    "don't",
    "I'LL",
    "1234567",
    "naïve",
    "  ",
    "\n\n",
    "\r\n",
    "é",
    "ﬁ x",
    "字体",
    "New York",
    "x" * 300,
]


def _corpus() -> list[str]:
    rng = random.Random(3)
    return [
        " ".join(rng.choices(["the", "cache", "holds", "1234", "don't", "naïve", "New", "York", "字体"], k=40))
        for _ in range(80)
    ]


def _train(name: str) -> Tokenizer:
    if name == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    elif name.startswith("unigram"):
        tokenizer = Tokenizer(models.Unigram())
        scheme = name.partition("-")[2]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif name == "llama2":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
        if name.startswith("gpt2"):
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=name == "gpt2-prefix")
        else:
            pattern = {"cl100k": cuts._CL100K, "qwen": cuts._QWEN, "o200k": cuts._O200K}[name]
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", begin), ("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def _awkward(tokenizer: Tokenizer) -> Tokenizer:
    """Add tokens that take white space, need word ends, or are looked for in normalized text."""
    tokenizer.add_special_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False, special=True),
            AddedToken("<eat>", rstrip=True, normalized=False, special=True),
            AddedToken("[W]", single_word=True, normalized=False, special=True),
        ]
    )
    tokenizer.add_tokens([AddedToken("New York", normalized=True), AddedToken("\n\n", normalized=False)])
    return tokenizer


KINDS = [
    "gpt2",
    "gpt2-prefix",
    "cl100k",
    "qwen",
    "o200k",
    "wordpiece",
    "unigram-always",
    "unigram-first",
    "unigram-never",
    "llama2",
]


@pytest.fixture(scope="module")
def encoders() -> dict[str, tuple[Encoder, Tokenizer]]:
    found = {}
    for kind in KINDS:
        for awkward in (False, True):
            tokenizer = _train(kind)
            if awkward:
                _awkward(tokenizer)
            files = ModelFiles(Path(kind), tokenizer.to_str(), {}, {}, {}, ())
            found[kind + ("+" if awkward else "")] = (Encoder(files, TextCache(2**24)), tokenizer)
    return found


@pytest.fixture(scope="module", autouse=True)
def _short_parts() -> object:
    """Cut as often as possible, so that short examples have many cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "MIN_CHARS", 1)
        patch.setattr(cuts, "MAX_CHARS", 1)
        patch.setattr(encoder_module, "LONG_CHARS", 4)
        patch.setattr(encoder_module, "_MORE_PARTS", 1)
        yield


PIECES = (
    st.lists(
        st.one_of(
            st.text(alphabet=ALPHABET, max_size=8),
            st.sampled_from(SPECIAL + WORDS + ["<mask>", "<eat>", "[W]"]),
            st.text(max_size=4),
        ),
        max_size=14,
    )
    .map("".join)
    .filter(lambda text: text.isprintable() or not any("\ud800" <= c <= "\udfff" for c in text))
)


@pytest.mark.parametrize("kind", [kind + mark for kind in KINDS for mark in ("", "+")])
@settings(max_examples=150, deadline=None)
@given(text=PIECES, more=PIECES)
def test_cached_equals_plain(kind: str, encoders: dict[str, tuple[Encoder, Tokenizer]], text: str, more: str) -> None:
    """A text, and a longer one after it, give the plain tokens although parts or beginnings come from the cache."""
    encoder, tokenizer = encoders[kind]
    for prompt in (text, text + more, more + text, text):
        for special in (False, True):
            plain = tokenizer.encode(prompt, add_special_tokens=special).ids
            assert encoder.encode(prompt, add_special_tokens=special).list() == plain
            known = encoder.known(prompt, add_special_tokens=special, truncation=None)
            assert known is None or known.list() == plain


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"gpt2-prefix", "llama2"}])
def test_plain_text_is_cut_at_words(kind: str, encoders: dict[str, tuple[Encoder, Tokenizer]]) -> None:
    """Where it is known to be safe, a text without added tokens is cut at white space."""
    assert len(encoders[kind][0].cut_rule.parts("the cache holds the cache")) > 3


@pytest.mark.parametrize("kind", ["gpt2-prefix", "llama2", "gpt2+", "cl100k+", "wordpiece+"])
def test_unknown_is_not_cut_at_words(kind: str, encoders: dict[str, tuple[Encoder, Tokenizer]]) -> None:
    """Pre-tokenizers that look around, and tokens that reach across words, leave only cuts at added tokens."""
    rule = encoders[kind][0].cut_rule
    assert rule.parts("the cache holds the cache") == ["the cache holds the cache"]
    assert rule.parts("the cache<|im_end|>holds") == ["the cache", "<|im_end|>holds"]


def test_longest_match_decides() -> None:
    """A token inside a longer one is no cut."""
    added = [cuts.Added(text, True, False, False, False, False) for text in ("<a>", "<a><b>", "<b>", "b><c>", "<c>")]
    rule = cuts.rule_of('{"model": {"type": "BPE"}}', added)
    assert rule.parts("x<a><b>y<b><c>z") == ["x", "<a><b>y", "<b>", "<c>z"]


def test_dropout_is_never_cut() -> None:
    """A model that tokenizes by chance is never cut, since nothing it gives is sure."""
    added = [cuts.Added("<a>", True, False, False, False, False)]
    assert cuts.rule_of('{"model": {"type": "BPE", "dropout": 0.1}}', added).parts("x<a>y") == ["x<a>y"]

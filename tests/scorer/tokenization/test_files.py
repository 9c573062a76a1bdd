"""Tokenizer folders are read as transformers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kvatlas.scorer.tokenization import files
from kvatlas.scorer.tokenization.encoder import Encoder
from kvatlas.scorer.tokenization.errors import BadModelError
from kvatlas.scorer.tokenization.text_cache import TextCache

SOURCE = Path(__file__).parents[2] / "data" / "tokenizer"
TEXT = "<|im_start|>user\n<extra> the cache<|new|> holds it<|im_end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(SOURCE / "tokenizer.json", tmp_path)
    return tmp_path


def _config(folder: Path, **config: Any) -> None:
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    (folder / files.CONFIG_FILE).write_text(text)


def test_template_places(folder: Path) -> None:
    """Template files win over the processor's file, which wins over the configuration; names are kept."""
    _config(folder, chat_template=[{"name": "default", "template": "c"}, {"name": "rag", "template": "r"}])
    assert files.read(folder).templates == {"default": "c", "rag": "r"}
    (folder / files.PROCESSOR_TEMPLATE_FILE).write_text('{"chat_template": "p"}')
    assert files.read(folder).templates == {"default": "p"}
    (folder / files.TEMPLATE_FILE).write_text("f")
    (folder / files.TEMPLATE_FOLDER).mkdir()
    (folder / files.TEMPLATE_FOLDER / "tool_use.jinja").write_text("t")
    found = files.read(folder)
    assert found.templates == {"default": "f", "tool_use": "t"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == found.templates


def test_special_tokens(folder: Path) -> None:
    """Special tokens are text or objects, in the configuration or the older file, and models may add names."""
    _config(
        folder, bos_token={"content": "<|bos|>", "lstrip": False}, extra_special_tokens={"image_token": "<|image|>"}
    )
    (folder / files.SPECIAL_TOKENS_FILE).write_text('{"eos_token": "<|im_end|>"}')
    found = files.read(folder).special_tokens
    assert found == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "image_token": "<|image|>"}


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokens_of_the_configuration_are_added(folder: Path, add_bos: bool) -> None:
    """Added tokens that only the configuration has are known too; tokenizer.json alone says what is put around."""
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    added = {
        str(size): {"content": "<extra>", "special": False, **flags},
        str(size + 1): {"content": "<|new|>", "special": True, **flags},
    }
    _config(folder, added_tokens_decoder=added, bos_token="<|bos|>", add_bos_token=add_bos)
    encoder = Encoder(files.read(folder), TextCache(2**20))
    assert encoder.encode(TEXT).list() == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_own_tokenizer_equals_transformers() -> None:
    """The tokenizer of the tests gives what transformers makes of the same folder."""
    encoder = Encoder(files.read(SOURCE), TextCache(0))
    reference = AutoTokenizer.from_pretrained(SOURCE)
    for special in (True, False):
        wanted = reference(TEXT, add_special_tokens=special)["input_ids"]
        assert encoder.encode(TEXT, add_special_tokens=special).list() == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (files.CONFIG_FILE, "{"),
        (files.CONFIG_FILE, "[]"),
        (files.CONFIG_FILE, '{"chat_template": 3}'),
        (files.CONFIG_FILE, '{"added_tokens_decoder": {"1": 2}}'),
        (files.PROCESSOR_TEMPLATE_FILE, "no"),
        (files.TOKENIZER_FILE, '{"model": 1}'),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, text: str) -> None:
    """A file of the wrong shape is an error that names it."""
    (folder / name).write_text(text)
    with pytest.raises(BadModelError, match=r"tokenizer_config|chat_template|tokenizer\.json"):
        Encoder(files.read(folder), TextCache(0))

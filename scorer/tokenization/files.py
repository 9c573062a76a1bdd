"""Reads a model's tokenizer folder: the only place that knows its file names.

::

    tokenizer.json                    the tokenizer itself (required)
    tokenizer_config.json             special tokens, template(s), truncation side
    special_tokens_map.json           special tokens of older models
    chat_template.jinja               the template; wins over the one in the config
    chat_template.json                {"chat_template": ...}, as processors save it; after the .jinja file
    additional_chat_templates/*.jinja further templates by name
    config.json                       the model's type, which decides who renders its chats (optional)
    tekken.json, tokenizer.model.v*   say that the model has Mistral's own format; not read
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvatlas.scorer.tokenization.errors import BadModelError

TOKENIZER_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
PROCESSOR_TEMPLATE_FILE: Final = "chat_template.json"
TEMPLATE_FOLDER: Final = "additional_chat_templates"
MODEL_CONFIG_FILE: Final = "config.json"
#: Their presence makes vLLM render with mistral-common.
_MISTRAL_FILES: Final = ("tekken.json", "tokenizer.model.v*")

#: Everything a tokenizer needs, as patterns for a hub.
PATTERNS: Final = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    PROCESSOR_TEMPLATE_FILE,
    f"{TEMPLATE_FOLDER}/*.jinja",
    MODEL_CONFIG_FILE,
    *_MISTRAL_FILES,
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's tokenizer as read from its folder.

    Attributes:
        folder: where it was read, for messages.
        tokenizer: text of ``tokenizer.json``.
        config: ``tokenizer_config.json``, empty when absent.
        templates: chat templates by name; ``default`` is the one without a name.
        special_tokens: template variable -> token text, such as ``bos_token``.
        added_tokens: tokens the config adds to those in ``tokenizer.json``, as they stand there, by id.
        model_config: ``config.json``, empty when absent.
        mistral_format: the folder has the tokenizer in Mistral's own format too.
    """

    folder: Path
    tokenizer: str
    config: Mapping[str, Any]
    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    added_tokens: tuple[Mapping[str, Any], ...]
    model_config: Mapping[str, Any] = field(default_factory=dict)
    mistral_format: bool = False


def read(folder: Path) -> ModelFiles:
    """Read a tokenizer folder.

    Raises:
        BadModelError: ``tokenizer.json`` is missing, or a file cannot be read or has the wrong shape.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise BadModelError(
            f"{folder} has no {TOKENIZER_FILE}: save the tokenizer with tokenizer.save_pretrained() of transformers, "
            f"which writes it, and copy the folder here"
        )
    config = _json(folder / CONFIG_FILE)
    legacy = {} if "added_tokens_decoder" in config else _json(folder / SPECIAL_TOKENS_FILE)
    return ModelFiles(
        folder=folder,
        tokenizer=_text(path),
        config=config,
        templates=_templates(folder, config),
        special_tokens=_special_tokens({**config, **legacy}),
        added_tokens=_added_tokens(folder, config),
        model_config=_json(folder / MODEL_CONFIG_FILE),
        mistral_format=any(True for pattern in _MISTRAL_FILES for _ in folder.glob(pattern)),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadModelError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(_text(path))
    except ValueError as error:
        raise BadModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadModelError(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over the config as a whole, as transformers reads them."""
    found = {}
    if (folder / TEMPLATE_FILE).is_file():
        found["default"] = _text(folder / TEMPLATE_FILE)
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[path.stem] = _text(path)
    if found:
        return found
    processor = _json(folder / PROCESSOR_TEMPLATE_FILE).get("chat_template")
    return _named_templates(folder, processor if processor else config.get("chat_template"))


def _named_templates(folder: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return value
    raise BadModelError(f"{folder / CONFIG_FILE}: chat_template must be text, or templates by name")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return every ``*_token`` of the config, so that templates can use those of the model's own invention too."""
    found: dict[str, str] = {}
    extra = config.get("extra_special_tokens")
    for key, value in (*config.items(), *(extra.items() if isinstance(extra, dict) else ())):
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (key.endswith("_token") or (isinstance(extra, dict) and key in extra)):
            found[key] = text
    return found


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    decoder = config.get("added_tokens_decoder") or {}
    try:
        ordered = sorted(decoder.items(), key=lambda item: int(item[0]))
        return tuple(dict(token) for _, token in ordered if isinstance(token["content"], str))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadModelError(f"{folder / CONFIG_FILE}: added_tokens_decoder is not token by id: {error}") from error

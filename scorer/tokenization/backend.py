"""Backends: where a model's tokenizer comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from kvatlas.scorer.tokenization import files
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.encoder import Encoder
from kvatlas.scorer.tokenization.errors import NoTokenizerError
from kvatlas.scorer.tokenization.records import ChatInput, Encoded, Truncation
from kvatlas.scorer.tokenization.text_cache import TextCache


class Engine(Protocol):
    """A model's tokenizer, loaded. Calls block and may come from many threads at once.

    Attributes:
        size_bytes: what it counts for against the limit on loaded models.
    """

    size_bytes: int

    def encode(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None, offsets: bool) -> Encoded:
        """Tokenize one text."""

    def render(self, chat: ChatInput) -> str:
        """Render a chat as text."""

    def encode_chat(self, chat: ChatInput, truncation: Truncation | None) -> Encoded:
        """Render a chat and tokenize it; the template brings the special tokens."""

    def close(self) -> None:
        """Give back what the engine holds; calls under way still end well."""


class Backend(Protocol):
    """Makes engines. ``load`` blocks; it is called once per model, however many ask at the same time.

    Attributes:
        name: what answers say about who answered.
        waits: its engines wait for a network and not for this machine's processor, so they get threads of their own.
    """

    name: str
    waits: bool

    def load(self, model: str) -> Engine:
        """Load a model's tokenizer.

        Raises:
            NoTokenizerError: this backend does not know the model.
            BadModelError: it does, and the files are no good.
            BackendError: it cannot say now.
        """

    def close(self) -> None:
        """Give back connections."""


class FolderEngine:
    """A tokenizer from a folder of files, on this machine."""

    def __init__(self, folder: Path, cache: TextCache, renderer: ChatRenderer) -> None:
        loaded = files.read(folder)
        self._templates = loaded.templates
        self._special_tokens = loaded.special_tokens
        self._renderer = renderer
        self.size_bytes = len(loaded.tokenizer)
        self._encoder = Encoder(loaded, cache)

    def encode(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None, offsets: bool) -> Encoded:
        """Tokenize one text."""
        return self._encoder.encode(text, add_special_tokens=add_special_tokens, truncation=truncation, offsets=offsets)

    def render(self, chat: ChatInput) -> str:
        """Render a chat as text."""
        return self._renderer.render(chat, self._templates, self._special_tokens)

    def encode_chat(self, chat: ChatInput, truncation: Truncation | None) -> Encoded:
        """Render a chat and tokenize it; the template brings the special tokens."""
        return self.encode(self.render(chat), add_special_tokens=False, truncation=truncation, offsets=False)

    def close(self) -> None:
        """Drop the known text of this tokenizer."""
        self._encoder.forget()


class LocalBackend:
    """Tokenizers from folders on this machine: named ones first, then those under a root folder."""

    name = "local"
    waits = False

    def __init__(
        self, folders: Mapping[str, Path], root: Path | None, cache: TextCache, renderer: ChatRenderer
    ) -> None:
        self._renderer = renderer
        self._folders = dict(folders)
        self._root = root
        self._cache = cache

    def load(self, model: str) -> FolderEngine:
        """Load the tokenizer in a model's folder.

        Raises:
            NoTokenizerError: no folder is named for the model and the root has none of its name.
            BadModelError: the folder's files are missing or no good.
        """
        return FolderEngine(self._folder(model), self._cache, self._renderer)

    def close(self) -> None:
        """Nothing is held."""

    def _folder(self, model: str) -> Path:
        named = self._folders.get(model)
        if named is not None:
            return named
        if self._root is None:
            raise NoTokenizerError(f"no folder is named for model {model!r} (setting models, MODEL=DIR), and no root")
        root = self._root.resolve()
        folder = (root / model).resolve()
        # Model names come from requests and must not lead out of the root.
        if not folder.is_relative_to(root) or folder == root or not folder.is_dir():
            raise NoTokenizerError(f"{self._root} has no folder for model {model!r}")
        return folder

"""Backends: where a model's tokenizer comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvatlas.scorer.tokenization import files
from kvatlas.scorer.tokenization.arguments import UNKNOWN, EngineArguments
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.encoder import Encoder
from kvatlas.scorer.tokenization.errors import NoTokenizerError, TokenizeInputError
from kvatlas.scorer.tokenization.harmony import HarmonyRenderer
from kvatlas.scorer.tokenization.media import has_media, widened
from kvatlas.scorer.tokenization.records import ChatInput, Encoded, Truncation
from kvatlas.scorer.tokenization.renderers import renderer_of
from kvatlas.scorer.tokenization.text_cache import TextCache
from kvatlas.scorer.tokenization.tokenizer_class import Transformers


class LoadedTokenizer(Protocol):
    """A model's tokenizer, loaded. Calls block and may come from many threads at once.

    Attributes:
        size_bytes: what it counts for against the limit on loaded models.
    """

    size_bytes: int

    def encode(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None, offsets: bool) -> Encoded:
        """Tokenize one text."""

    def known(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None) -> Encoded | None:
        """Return the tokens of a text that is known as a whole, None where finding them takes time."""

    def render(self, chat: ChatInput) -> str:
        """Render a chat as text."""

    def encode_chat(self, chat: ChatInput, truncation: Truncation | None) -> Encoded:
        """Render a chat and tokenize it; the template brings the special tokens."""

    def text(self, ids: bytes) -> str:
        """Return the text of packed token ids, empty where that cannot be told."""

    def close(self) -> None:
        """Give back what the engine holds; calls under way still end well."""


class TokenizerBackend(Protocol):
    """Makes engines. ``load`` blocks; it is called once per model, however many ask at the same time.

    Attributes:
        name: what answers say about who answered.
        waits: its engines wait for a network and not for this machine's processor, so they get threads of their own.
    """

    name: str
    waits: bool

    def load(self, model: str) -> LoadedTokenizer:
        """Load a model's tokenizer.

        Raises:
            NoTokenizerError: this backend does not know the model.
            BadModelError: it does, and the files are no good.
            BackendError: it cannot say now.
        """

    def close(self) -> None:
        """Give back connections."""


class Making(NamedTuple):
    """What engines from folders share.

    Attributes:
        cache: tokens of known text.
        renderer: renders templates.
        harmony: renders gpt-oss chats.
        transformers: major version of transformers that the engines have.
        arguments: command lines of the engines by model.
    """

    cache: TextCache
    renderer: ChatRenderer
    harmony: HarmonyRenderer
    transformers: Transformers = "5"
    arguments: Mapping[str, EngineArguments] = MappingProxyType({})


class FolderEngine:
    """A tokenizer from a folder of files, on this machine."""

    def __init__(self, folder: Path, making: Making, arguments: EngineArguments = UNKNOWN) -> None:
        loaded = files.read(folder)
        self._templates = dict(loaded.templates)
        if arguments.chat_template is not None:
            self._templates = {"default": arguments.chat_template}
        self._special_tokens = loaded.special_tokens
        self._arguments = arguments
        self._render_as = renderer_of(loaded, arguments)
        self._renderer = making.renderer
        self._harmony = making.harmony
        self.size_bytes = len(loaded.tokenizer)
        self._encoder = Encoder(loaded, making.cache, making.transformers)

    def encode(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None, offsets: bool) -> Encoded:
        """Tokenize one text."""
        return self._encoder.encode(text, add_special_tokens=add_special_tokens, truncation=truncation, offsets=offsets)

    def known(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None) -> Encoded | None:
        """Return the tokens of a text that is known as a whole."""
        return self._encoder.known(text, add_special_tokens=add_special_tokens, truncation=truncation)

    def text(self, ids: bytes) -> str:
        """Return the text of token ids."""
        if self._render_as.kind == "harmony":
            return self._harmony.text(Encoded(ids).list())
        return self._encoder.text(ids)

    def render(self, chat: ChatInput) -> str:
        """Render a chat as text."""
        if self._render_as.refused:
            raise TokenizeInputError(self._render_as.refused)
        if self._render_as.kind == "harmony":
            return self._harmony.text(self._harmony_chat(chat).list())
        return self._renderer.render(chat, self._templates, self._special_tokens, self._arguments)

    def encode_chat(self, chat: ChatInput, truncation: Truncation | None) -> Encoded:
        """Render a chat and tokenize it; the template brings the special tokens."""
        if self._render_as.kind == "harmony":
            return self._harmony_chat(chat)  # the engine cuts such prompts as little
        text = self.render(chat)
        special = chat.add_special_tokens
        if not has_media(chat.messages):
            return self.encode(text, add_special_tokens=special, truncation=truncation, offsets=False)
        encoded = self.encode(text, add_special_tokens=special, truncation=None, offsets=False)
        return Encoded(widened(encoded.ids, chat, self._encoder.is_placeholder))

    def _harmony_chat(self, chat: ChatInput) -> Encoded:
        effort = self._arguments.effort_of(chat.reasoning_effort)
        with_tools = not self._arguments.hides_tools(chat)
        return Encoded(self._harmony.encode(chat, effort, with_tools=with_tools))

    def close(self) -> None:
        """Drop the known text of this tokenizer."""
        self._encoder.forget()


class LocalBackend:
    """Tokenizers from folders on this machine: named ones first, then those under a root folder."""

    name = "local"
    waits = False

    def __init__(self, folders: Mapping[str, Path], root: Path | None, making: Making) -> None:
        self._folders = dict(folders)
        self._root = root
        self._making = making

    def load(self, model: str) -> FolderEngine:
        """Load the tokenizer in a model's folder.

        Raises:
            NoTokenizerError: no folder is named for the model and the root has none of its name.
            BadModelError: the folder's files are missing or no good.
        """
        return FolderEngine(self._folder(model), self._making, self._making.arguments.get(model, UNKNOWN))

    def close(self) -> None:
        """Nothing is held."""

    def _folder(self, model: str) -> Path:
        named = self._folders.get(model)
        if named is not None:
            return named
        if self._root is None:
            raise NoTokenizerError(f"no folder is named for model {model!r} (setting models, MODEL=DIR), and no root")
        root = self._root.resolve()
        try:
            folder = (root / model).resolve()
            # Model names come from requests and must not lead out of the root.
            found = folder.is_relative_to(root) and folder != root and folder.is_dir()
        except (OSError, ValueError):  # longer than a file's name may be, or with a NUL inside
            found = False
        if not found:
            raise NoTokenizerError(f"{self._root} has no folder for model {model!r}")
        return folder

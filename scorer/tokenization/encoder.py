"""One loaded tokenizer: text to token ids, with special tokens, truncation, offsets and the cache of known text."""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec
from tokenizers import AddedToken, Encoding, Tokenizer

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.scorer.tokenization import cuts
from kvatlas.scorer.tokenization.errors import BadModelError, TokenizeInputError
from kvatlas.scorer.tokenization.files import TOKENIZER_FILE, ModelFiles
from kvatlas.scorer.tokenization.records import Encoded, Truncation
from kvatlas.scorer.tokenization.text_cache import LONG_CHARS, Beginning, TextCache
from kvatlas.scorer.tokenization.tokenizer_class import Transformers, set_post_processor, tokenizer_document

_owners = itertools.count(1)
#: More text past a known beginning is not even looked up in the caller's thread, where every request waits for it.
_AT_ONCE_CHARS: Final = 65_536
#: A long text that has so many parts past the beginning that was known becomes one itself.
_MORE_PARTS: Final = 16
_NOT_BEGUN: Final = Beginning("", 0, b"")
#: Two texts that have no token in common with usual special tokens, to see what a post-processor puts around them.
_PROBES: Final = ("a", "Some text, then 42 more.\nEnd")


class Encoder:
    """A tokenizer as the engine loads it. Calls block; they are safe from many threads and release the GIL.

    Raises:
        BadModelError: ``tokenizer.json`` is not one.
    """

    def __init__(self, files: ModelFiles, cache: TextCache, transformers: Transformers = "5") -> None:
        self._cache = cache
        self._owner = next(_owners)
        try:
            document = tokenizer_document(files, transformers)
        except msgspec.MsgspecError as error:
            raise BadModelError(f"{files.folder / TOKENIZER_FILE} is not a tokenizer: {error}") from error
        self._tokenizer = _load(files, document)
        set_post_processor(self._tokenizer, files, transformers)
        # Engines that generate keep the end of a prompt, whatever the tokenizer's configuration says.
        self._left = True
        split_special = bool(files.config.get("split_special_tokens"))
        self._tokenizer.encode_special_tokens = split_special
        added = _added(self._tokenizer)
        #: So far past an end of a part lies what decides about it: an added token, or a white space.
        self._reach = max((len(token.content) for token in added), default=0) + 2
        try:
            self.cut_rule = cuts.rule_of(document, added, split_special_tokens=split_special)
        except msgspec.MsgspecError as error:
            raise BadModelError(f"{files.folder / TOKENIZER_FILE} is not a tokenizer: {error}") from error
        self._placeholders = _named_placeholders(files) or frozenset(self._tokenizer.get_added_tokens_decoder())
        self._frame = self._find_frame()

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncation: Truncation | None = None,
        offsets: bool = False,
    ) -> Encoded:
        """Tokenize one text.

        Args:
            text: the prompt.
            add_special_tokens: add what the tokenizer's post-processor adds, such as a beginning token.
            truncation: how to cut when there are too many tokens; None keeps all.
            offsets: also return where in the text each token stands.

        Raises:
            TokenizeInputError: the text holds lone surrogates, or truncation makes no sense.
        """
        if truncation is not None and truncation.tokens < 0:
            raise TokenizeInputError(f"truncation to {truncation.tokens} tokens: give a number from 0 on")
        if offsets or (add_special_tokens and self._frame is None):
            return self._encode_whole(text, add_special_tokens, truncation, offsets)
        return self._framed(*self._content(text), add_special_tokens, truncation)

    def known(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None) -> Encoded | None:
        """Return what :meth:`encode` returns for a text that is known as a whole; None for any other, at once."""
        short = not self._cache.enabled or len(text) < cuts.MIN_CHARS
        if short or (add_special_tokens and self._frame is None) or (truncation is not None and truncation.tokens < 0):
            return None
        begun = self._begun(text)
        if len(text) - begun.chars > _AT_ONCE_CHARS:
            return None
        found = self._cache.get(self._owner, self.cut_rule.parts(text[begun.chars :]))
        if None in found:
            return None
        ids = b"".join((begun.tokens, *found))  # type: ignore[arg-type]  # none is missing
        return self._framed(ids, len(text), add_special_tokens, truncation)

    def _begun(self, text: str) -> Beginning:
        found = self._cache.beginning(self._owner, text) if len(text) >= LONG_CHARS else None
        return found or _NOT_BEGUN

    def _framed(self, ids: bytes, known_chars: int, add_special_tokens: bool, truncation: Truncation | None) -> Encoded:
        before, after = self._frame if add_special_tokens and self._frame is not None else (b"", b"")
        if truncation is not None and truncation.side is None:
            room = max(0, truncation.tokens - (len(before) + len(after)) // 4)
            ids = _slice(ids, room, left=self._left)
        return Encoded(ids=_truncated(before + ids + after, truncation, left=self._left), known_chars=known_chars)

    def text(self, ids: bytes) -> str:
        """Return the text that token ids stand for, special tokens included; unknown ids leave nothing."""
        values = array("I", ids)
        if sys.byteorder == "big":
            values.byteswap()
        found: str = self._tokenizer.decode(list(values), skip_special_tokens=False)
        return found

    def is_placeholder(self, token: int) -> bool:
        """Whether a token can stand for a multimodal item: one that the model names, else any added one."""
        return token in self._placeholders

    def forget(self) -> None:
        """Drop the known text of this tokenizer; called when it is unloaded."""
        self._cache.drop(self._owner)

    def _content(self, text: str) -> tuple[bytes, int]:
        """Return the tokens of a text without special tokens around, and how many of its characters were known."""
        if not self._cache.enabled or len(text) < cuts.MIN_CHARS:
            return _packed(self._batch([text])[0]), 0
        begun = self._begun(text)
        parts = self.cut_rule.parts(text[begun.chars :])
        found = self._cache.get(self._owner, parts)
        missing = [number for number, tokens in enumerate(found) if tokens is None]
        fresh = self._batch([parts[number] for number in missing]) if missing else []
        for number, encoding in zip(missing, fresh, strict=True):
            found[number] = _packed(encoding)
        if missing:
            self._cache.put(self._owner, ((parts[number], found[number] or b"") for number in missing))
        tokens = [begun.tokens, *(part or b"" for part in found)]
        if len(text) >= LONG_CHARS and len(parts) > _MORE_PARTS:
            self._keep_beginning(text, parts, tokens)
        unknown = sum(len(parts[number]) for number in missing)
        return b"".join(tokens), len(text) - unknown

    def _keep_beginning(self, text: str, parts: Sequence[str], tokens: Sequence[bytes]) -> None:
        """Keep a long text up to an end of a part that no other text's going on can move."""
        end, count = len(text), len(parts)
        while count and len(text) - end < self._reach:
            count -= 1
            end -= len(parts[count])
        if count:
            known = Beginning(text[: end + self._reach], end, b"".join(tokens[: count + 1]))
            self._cache.put_beginning(self._owner, known)

    def _batch(self, texts: Sequence[str]) -> list[Encoding]:
        try:
            # The fast variant leaves offsets out.
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizeInputError(f"the text is not valid Unicode (lone surrogates?): {error}") from error

    def _encode_whole(
        self, text: str, add_special_tokens: bool, truncation: Truncation | None, offsets: bool
    ) -> Encoded:
        try:
            # A batch of one: unlike encode(), it lets other threads encode meanwhile.
            encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizeInputError(f"the text is not valid Unicode (lone surrogates?): {error}") from error
        if truncation is not None and truncation.side is None:
            added = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            encoding.truncate(max(0, truncation.tokens - added), stride=0, direction="left" if self._left else "right")
        if add_special_tokens:
            encoding = self._tokenizer.post_process(encoding, add_special_tokens=True)
        ids = _truncated(_packed(encoding), truncation, left=self._left)
        places = None
        if offsets:
            places = encoding.offsets
            if truncation is not None:
                cut = slice(None, truncation.tokens) if not _from_left(truncation, self._left) else None
                places = places[cut] if cut else places[len(places) - len(ids) // 4 :]
        return Encoded(ids=ids, offsets=places)

    def _find_frame(self) -> tuple[bytes, bytes] | None:
        """Return the tokens put before and after any text, or None when they cannot be told apart for sure."""
        frames = set()
        for probe in _PROBES:
            plain = self._tokenizer.encode(probe, add_special_tokens=False).ids
            full = self._tokenizer.encode(probe, add_special_tokens=True)
            inside = [number for number, sequence in enumerate(full.sequence_ids) if sequence == 0]
            if not inside or full.ids[inside[0] : inside[-1] + 1] != plain:
                return None
            frames.add((tuple(full.ids[: inside[0]]), tuple(full.ids[inside[-1] + 1 :])))
        before, after = frames.pop()
        if frames or tuple(self._tokenizer.encode("", add_special_tokens=True).ids) != before + after:
            return None
        return pack_tokens(before), pack_tokens(after)


def _named_placeholders(files: ModelFiles) -> frozenset[int]:
    """Return the tokens that ``config.json`` names as those of items, such as ``image_token_id``."""
    named = (
        value
        for name, value in files.model_config.items()
        if name.endswith(("_token_id", "_token_index")) and name.startswith(("image_", "video_", "audio_"))
    )
    return frozenset(value for value in named if isinstance(value, int))


def _load(files: ModelFiles, document: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(document)
    except Exception as error:  # the library raises bare Exception
        raise BadModelError(f"{files.folder / TOKENIZER_FILE} is not a tokenizer: {error}") from error
    # Whatever was saved with it; engines set both for each request.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in files.added_tokens:
        if token["content"] in known:
            continue
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
        added = AddedToken(token["content"], normalized=bool(token.get("normalized", not flags["special"])), **flags)
        if flags["special"]:
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
    return tokenizer


def _added(tokenizer: Tokenizer) -> list[cuts.Added]:
    return [
        cuts.Added(
            content=token.content,
            special=token.special,
            normalized=token.normalized,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
        )
        for token in tokenizer.get_added_tokens_decoder().values()
    ]


def _from_left(truncation: Truncation, left: bool) -> bool:
    return truncation.side == "left" if truncation.side else left


def _truncated(ids: bytes, truncation: Truncation | None, *, left: bool) -> bytes:
    return ids if truncation is None else _slice(ids, truncation.tokens, left=_from_left(truncation, left))


def _slice(ids: bytes, tokens: int, *, left: bool) -> bytes:
    if len(ids) <= 4 * tokens:
        return ids
    return ids[len(ids) - 4 * tokens :] if left else ids[: 4 * tokens]


def _packed(encoding: Encoding) -> bytes:
    return pack_tokens(encoding.ids)

r"""Where a text may be cut so that its parts tokenize on their own to exactly what the whole gives.

A `tokenizers` pipeline works in this order, and that order is what the two kinds of cuts rest on::

    text -> added tokens that are not normalized, found leftmost-longest; what lies between them is a piece
         -> each piece: normalizer, then added tokens that are normalized
         -> each piece: pre-tokenizer -> words -> model, each word on its own

**Before an added token.** Pieces never look across an added token, so the start of one is a cut, if the token is found
on the text as it is (``normalized`` false), takes no text before it (``lstrip``), does not depend on its neighbours
(``single_word``), and starts with neither a white space (which the ``rstrip`` of a token before might take) nor a
word character (on which a ``single_word`` token before might depend). Matching is leftmost-longest over *all* such
tokens, so cuts are taken from real matches, never from mere occurrences. The part after the cut starts with the token,
so pre-tokenizers that treat the beginning of the text apart (Metaspace, ``prepend_scheme = first``) see no difference.

**Between a letter or digit and a white space**, both ASCII: there every word of the pre-tokenizers listed below ends,
whatever comes before or after. This is known for each listed pre-tokenizer and each listed Split regex: no
alternative matches a letter or digit followed by a white space, and none looks back. It needs a normalizer that keeps
both characters and their neighbourhood, and added tokens that do not reach across.

Anything else, such as a model with dropout, is never cut.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

#: A part ends at the first added token after so many characters: shorter parts cost more to look up than they save.
MIN_CHARS: Final = 256
#: A part without an added token ends at the first white space after so many characters.
MAX_CHARS: Final = 1024

_BOTH: Final = " \n"
_SAFE_NORMALIZERS: Final = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}

_GPT2: Final = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K: Final = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_QWEN: Final = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K: Final = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
#: Split regexes in front of byte-level whose words all end between an ASCII letter or digit and a white space:
#: GPT-2; GPT-4 and Llama 3; Qwen; GPT-4o.
KNOWN_SPLITS: Final = frozenset({_GPT2, _CL100K, _QWEN, _O200K})


@dataclass(frozen=True, slots=True)
class Added:
    """An added token, as far as cutting depends on it."""

    content: str
    special: bool
    normalized: bool
    single_word: bool
    lstrip: bool
    rstrip: bool


class _Model(msgspec.Struct):
    type: str = ""
    dropout: float | None = None


class _Document(msgspec.Struct):
    """What decides about cuts in ``tokenizer.json``; the vocabulary is skipped."""

    model: _Model
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class CutRule:
    """The cuts of one tokenizer.

    Attributes:
        tokens: finds added tokens; group 1 takes part when the match may be cut before. None: no such cuts.
        spaces: finds a place for a cut at a white space (its end); None: no such cuts.
    """

    tokens: re.Pattern[str] | None = None
    spaces: re.Pattern[str] | None = None

    def parts(self, text: str) -> list[str]:
        """Split a text into parts that tokenize on their own to what the whole gives; joined they are the text.

        Where a part ends depends only on the text up to a few characters past its end, so two texts with a common
        beginning have the same parts there.
        """
        if self.tokens is None:
            starts: list[int] = []
        else:
            starts = [match.start() for match in self.tokens.finditer(text) if match.lastindex]
        starts.append(len(text))
        parts: list[str] = []
        begin = 0
        for start in starts:
            if start - begin < MIN_CHARS and start != len(text):
                continue
            begin = self._cut_spaces(text, begin, start, parts)
            if begin < start and (start - begin >= MIN_CHARS or start == len(text)):
                parts.append(text[begin:start])
                begin = start
        return parts

    def _cut_spaces(self, text: str, begin: int, end: int, parts: list[str]) -> int:
        """Cut what is long at white spaces; returns where the rest, not yet in ``parts``, begins."""
        if self.spaces is None:
            return begin
        while match := self.spaces.search(text, begin + MAX_CHARS, end):
            parts.append(text[begin : match.end()])
            begin = match.end()
        return begin


def rule_of(tokenizer_json: str | bytes, added: Sequence[Added], *, split_special_tokens: bool = False) -> CutRule:
    """Derive where texts may be cut from the parts of a tokenizer.

    Args:
        tokenizer_json: text of ``tokenizer.json``.
        added: all added tokens, those from the config included.
        split_special_tokens: special tokens in the text are taken as plain text.

    Raises:
        msgspec.ValidationError: the document is not a tokenizer.
    """
    document = msgspec.json.decode(tokenizer_json, type=_Document)
    if document.model.dropout:
        return CutRule()
    return CutRule(_token_pattern(added, split_special_tokens), _space_pattern(document, added))


def _token_pattern(added: Sequence[Added], split_special_tokens: bool) -> re.Pattern[str] | None:
    plain = [token for token in added if token.content and not token.normalized]
    cuttable = {token.content for token in plain if _cuttable(token, split_special_tokens)}
    if not cuttable:
        return None
    return re.compile(_alternatives({token.content: token.content in cuttable for token in plain}))


def _cuttable(token: Added, split_special_tokens: bool) -> bool:
    first = token.content[0]
    if token.lstrip or token.single_word or first.isspace() or first.isalnum() or first == "_":
        return False
    return not (token.special and split_special_tokens)


def _alternatives(contents: Mapping[str, bool]) -> str:
    """Return a regex that finds the longest of many texts; group 1 takes part when its value is true.

    A plain alternation of thousands of tokens would be tried one by one at every candidate; as a tree of prefixes
    each character is looked at once.
    """
    tree: dict[str, Any] = {}
    for content, flag in contents.items():
        node = tree
        for character in content:
            node = node.setdefault(character, {})
        node[""] = flag
    return _tree_regex(tree)


def _tree_regex(node: Mapping[str, Any]) -> str:
    branches = [re.escape(char) + _tree_regex(child) for char, child in node.items() if char]
    ends = "" if "" not in node else "()" if node[""] else "(?:)"
    if not branches:
        return ends
    # Longer texts first: children are tried before the end of this one.
    return f"(?:{'|'.join([*branches, ends] if '' in node else branches)})"


def _space_pattern(document: _Document, added: Iterable[Added]) -> re.Pattern[str] | None:
    spaces = _word_ends(document.pre_tokenizer or {})
    if not spaces or not all(part.get("type") in _SAFE_NORMALIZERS for part in _flat(document.normalizer)):
        return None
    if any(_reaches_across(token) for token in added):
        return None
    return re.compile(f"[A-Za-z0-9](?=[{spaces}])")


def _flat(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return a component as the list of its steps."""
    if component is None:
        return []
    if component.get("type") == "Sequence":
        steps = component.get("normalizers") or component.get("pretokenizers") or []
        return [part for step in steps for part in _flat(step)]
    return [component]


def _word_ends(pre_tokenizer: Mapping[str, Any]) -> str:
    """Return the white spaces before which, after a letter or digit, every word ends; empty when that is not known."""
    steps = _flat(pre_tokenizer)
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds in (["BertPreTokenizer"], ["Whitespace"], ["WhitespaceSplit"]):
        return _BOTH
    if kinds == ["Metaspace"]:
        # Only the blank itself becomes the mark at which Metaspace splits.
        return " " if last.get("split", True) else ""
    if kinds == ["ByteLevel"]:
        return _BOTH if last.get("use_regex", True) and not last.get("add_prefix_space", True) else ""
    if kinds == ["Split", "ByteLevel"]:
        split = steps[0]
        known = split.get("pattern", {}).get("Regex") in KNOWN_SPLITS
        whole = split.get("behavior") == "Isolated" and not split.get("invert")
        bare = not last.get("use_regex", True) and not last.get("add_prefix_space", True)
        return _BOTH if known and whole and bare else ""
    return ""


_ACROSS: Final = re.compile(r"[A-Za-z0-9]\s")
_FORMS: Final = ("NFC", "NFD", "NFKC", "NFKD")


def _reaches_across(token: Added) -> bool:
    """Whether a token could touch both sides of a cut at a white space."""
    texts = {token.content, *(unicodedata.normalize(form, token.content) for form in _FORMS)}
    if any(_ACROSS.search(text) for text in texts):
        return True
    ends_in_word = any(text and text[-1].isascii() and text[-1].isalnum() for text in texts)
    starts_with_space = any(text[:1].isspace() for text in texts)
    return (token.rstrip and ends_in_word) or (token.single_word and starts_with_space)

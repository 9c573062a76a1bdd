"""Errors of tokenization; each is also one of the scorer's kinds, which decides the status a caller sees.

::

    ScorerError
    ├── UnknownModelError        (scorer) no backend knows the model
    │   └── NoTokenizerError     says what each backend answered
    ├── InputError               (scorer)
    │   ├── TokenizeInputError   text, messages or truncation that make no sense
    │   ├── TemplateError        a chat template does not compile, fails, or refuses the messages
    │   ├── NoTemplateError      the model has no chat template and the request brings none
    │   └── TooLargeError        (scorer)
    │       ├── PromptLimitError     more bytes, messages or tools than the limits allow
    │       └── TemplateLimitError   a template rendered for too long or too much
    ├── BadModelError            a model's tokenizer files are missing, unreadable or not what they claim to be
    └── BackendError             a hub or a tokenizer service did not answer (retriable)
"""

from __future__ import annotations

from kvatlas.scorer import errors


class NoTokenizerError(errors.UnknownModelError):
    """No backend has a tokenizer for this model; the text says what each of them answered."""


class TokenizeInputError(errors.InputError):
    """The text, the messages or the truncation asked for make no sense; names the field."""


class TemplateError(errors.InputError):
    """A chat template does not compile, fails, or refuses these messages; carries the template's own reason."""


class NoTemplateError(errors.InputError):
    """The model has no chat template (of that name), and the request brings none."""


class PromptLimitError(errors.TooLargeError):
    """A prompt or chat is larger than the limits allow; names the limit and the setting."""


class TemplateLimitError(errors.TooLargeError):
    """Rendering a chat template took too long or produced too much; names the setting."""


class BadModelError(errors.ScorerError):
    """A model's tokenizer files are missing, unreadable or not what they claim to be; names the file."""


class TokenizerBackendError(errors.ScorerError):
    """A hub or a tokenizer service did not answer; another backend, or the same later, may."""

    retriable = True

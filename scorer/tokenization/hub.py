"""Tokenizers from the Hugging Face hub, through its own client and its cache on disk."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kvatlas.scorer.tokenization import files
from kvatlas.scorer.tokenization.arguments import UNKNOWN
from kvatlas.scorer.tokenization.backend import FolderEngine, Making
from kvatlas.scorer.tokenization.errors import NoTokenizerError, TokenizerBackendError


class HubBackend:
    """Fetches a model's tokenizer files (not its weights) on first use; files already in the cache need no network."""

    name = "hub"
    waits = False

    def __init__(self, *, models: Sequence[str], revision: str, making: Making) -> None:
        self._models = models
        self._revision = revision
        self._making = making

    def load(self, model: str) -> FolderEngine:
        """Fetch and load a model's tokenizer.

        Raises:
            NoTokenizerError: the hub has no such model, or the settings do not allow to fetch it.
            BadModelError: the model has no tokenizer.json, or it is no good.
            BackendError: the hub does not answer and the files are not in the cache.
        """
        # A fifth of what a scorer's start would take, for a client that few ask for.
        import huggingface_hub  # noqa: PLC0415
        from huggingface_hub import errors  # noqa: PLC0415

        if self._models and not any(fnmatchcase(model, pattern) for pattern in self._models):
            raise NoTokenizerError(f"{model!r} is not among the models that may be fetched (setting hub_models)")
        try:
            folder = huggingface_hub.snapshot_download(
                model, revision=self._revision, allow_patterns=list(files.PATTERNS)
            )
        except (errors.HFValidationError, ValueError) as error:
            raise NoTokenizerError(f"{model!r} is not the name of a hub model") from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise NoTokenizerError(f"the hub has no model {model!r} at revision {self._revision!r}") from error
        except errors.LocalEntryNotFoundError as error:
            raise TokenizerBackendError(
                f"the hub cannot be reached and {model!r} is not in its cache: copy the model's tokenizer files here "
                f"and name their folder (setting models), or fill the cache where there is a network"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise TokenizerBackendError(f"the hub did not give {model!r}: {error}") from error
        return FolderEngine(Path(folder), self._making, self._making.arguments.get(model, UNKNOWN))

    def close(self) -> None:
        """Nothing is held."""

"""Who may ask what: bearer tokens with roles and tenants, TLS and mutual TLS.

The tokens file is TOML, one table per token; the name is for logs only, the token itself is given as its SHA-256::

    [tokens.router]
    sha256 = "..."                # printf %s TOKEN | sha256sum
    roles = ["score"]             # score, explain, admin (admin may do everything)
    cache_salts = ["tenant-a"]    # the only salts this caller may ask about; leave out to allow all

A tenant's blocks are keyed by its salt, so a caller that may not name a salt cannot learn whether its blocks exist.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import grpc
import msgspec
from msgspec import Meta

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.errors import AuthError, ForbiddenError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

ADMIN: Final = "admin"
_BEARER: Final = "bearer "


class Caller(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One token's holder; see the module's text."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    roles: list[Literal["score", "explain", "admin"]]
    cache_salts: list[str] | None = None

    def check(self, request: Any, salt_of: Callable[[str], str | None] = lambda _request_id: None) -> None:
        """Check that a request asks only for what this caller may see.

        Args:
            request: of any operation.
            salt_of: the cache salt of a prompt that was scored before, by its request id; None where none is known.

        Raises:
            ForbiddenError: it names a cache salt of somebody else, or none where one is needed, or a request id under
                which somebody else's prompt is remembered.
        """
        if self.cache_salts is None:
            return
        for one in _score_requests(request):
            if one.cache_salt not in self.cache_salts:
                raise ForbiddenError("cache_salt: not one that this token may ask about")
        if isinstance(request, pb.ReportDecisionRequest) and not request.HasField("request"):
            salt = salt_of(request.request_id)
            if salt is not None and salt not in self.cache_salts:
                raise ForbiddenError("request_id: its prompt has a cache salt that this token may not ask about")


_ANYBODY: Final = Caller(sha256="0" * 64, roles=["admin"])


def _score_requests(request: Any) -> Iterable[pb.ScoreRequest]:
    if isinstance(request, pb.ScoreRequest):
        return [request]
    if isinstance(request, pb.ScoreBatchRequest):
        return list(request.requests)
    if isinstance(request, (pb.PickRequest, pb.ReportDecisionRequest)) and request.HasField("request"):
        return [request.request]
    return []


class Guard:
    """Admits callers; without tokens everybody."""

    def __init__(self, callers: Mapping[str, Caller] | None = None) -> None:
        self._callers = None if callers is None else {caller.sha256: caller for caller in callers.values()}

    @classmethod
    def from_settings(cls, settings: ScorerSettings) -> Guard:
        """Read the tokens file.

        Raises:
            SettingsError: it cannot be read or says something else.
        """
        if not settings.tokens_file:
            return cls()
        try:
            document = tomllib.loads(Path(settings.tokens_file).read_text(encoding="utf-8"))
            return cls(msgspec.convert(document.get("tokens"), dict[str, Caller]))
        except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise SettingsError(f"[scorer] tokens_file {settings.tokens_file}: {error}") from error

    def admit(self, metadata: Any, role: str) -> Caller:
        """Return the caller of a request.

        Args:
            metadata: the request's (name, value) pairs.
            role: what the operation needs.

        Raises:
            AuthError: no token, or an unknown one.
            ForbiddenError: the token lacks the role.
        """
        if self._callers is None:
            return _ANYBODY
        text = next((str(value) for name, value in metadata or () if name == "authorization"), "")
        if not text.lower().startswith(_BEARER):
            raise AuthError("no bearer token: send `authorization: Bearer TOKEN`")
        caller = self._callers.get(hashlib.sha256(text[len(_BEARER) :].strip().encode()).hexdigest())
        if caller is None:
            raise AuthError("unknown bearer token")
        if role not in caller.roles and ADMIN not in caller.roles:
            raise ForbiddenError(f"this token does not have the role {role!r}")
        return caller


def server_credentials(settings: ScorerSettings) -> grpc.ServerCredentials | None:
    """Return TLS credentials of the server, None for plain connections.

    Raises:
        SettingsError: a file cannot be read.
    """
    if not settings.tls_certfile:
        return None
    pair = (_read(settings.tls_keyfile, "tls_keyfile"), _read(settings.tls_certfile, "tls_certfile"))
    roots = _read(settings.tls_client_cafile, "tls_client_cafile") if settings.tls_client_cafile else None
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def worker_credentials(settings: ScorerSettings) -> grpc.ChannelCredentials | None:
    """Return TLS credentials for the workers' lookup services, None for plain connections.

    Raises:
        SettingsError: a file cannot be read.
    """
    if not settings.worker_tls_cafile:
        return None
    return grpc.ssl_channel_credentials(_read(settings.worker_tls_cafile, "worker_tls_cafile"))


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"[scorer] {setting} {path}: {error.strerror}") from error

"""What readers may see, by the scorer's own rules about tokens, roles and salts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvatlas.bridge.model.block_key import tenant_of
from kvatlas.deploy.console.readers import NotForReaderError, Reader, Readers
from kvatlas.scorer.api.security import Caller, Guard
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.client import AsyncScorerClient
from kvatlas.scorer.errors import ClientError, InputError, ScorerError


def caller(token: str, *roles: Any, salts: list[str] | None = None) -> Caller:
    """Return a token's holder."""
    return Caller(sha256=hashlib.sha256(token.encode()).hexdigest(), roles=list(roles), cache_salts=salts)


GUARD = Guard(
    {
        "operator": caller("operator", "admin"),
        "router": caller("router", "score"),
        "tenant": caller("tenant", "score", "explain", salts=["a"]),
    }
)


class Scorer:
    """A scorer's front door: it admits and refuses as the real one, and knows nothing."""

    def __init__(self, own: str, away: Callable[[], bool]) -> None:
        self._own = own
        self._away = away

    async def call(self, name: str, request: Any, *, token: str = "") -> str:
        """Answer a call that is allowed."""
        if self._away():
            raise ClientError("UNAVAILABLE", "nobody there")
        used = token or self._own
        try:
            GUARD.admit([("authorization", f"Bearer {used}")] if used else [], ROLE_OF[name]).check(request)
        except ScorerError as error:
            raise ClientError(code_of(error).name, str(error)) from error
        return name

    async def close(self) -> None:
        """Nothing to close."""


def readers(
    own: str = "", clock: Callable[[], float] = lambda: 0.0, away: Callable[[], bool] = lambda: False
) -> Readers:
    """Readers of a console with a token of its own."""
    return Readers(lambda: cast("AsyncScorerClient", Scorer(own, away)), clock)


@pytest.mark.parametrize(
    ("reader", "sees"),
    [
        (Reader("operator", ""), None),
        (Reader("operator", "b"), "b"),
        (Reader("tenant", "a"), "a"),
        (Reader("tenant", ""), NotForReaderError),
        (Reader("tenant", "b"), NotForReaderError),
        (Reader("router", ""), NotForReaderError),
        (Reader("stranger", ""), NotForReaderError),
        (Reader("", ""), NotForReaderError),
    ],
)
async def test_a_tenant_sees_its_own_salts_alone(reader: Reader, sees: Any) -> None:
    """An operator sees all or one salt; a tenant what it may name; without the role explain there is nothing."""
    if sees is NotForReaderError:
        with pytest.raises(NotForReaderError):
            await readers().salt_of(reader)
    else:
        assert await readers().salt_of(reader) == sees


async def test_what_belongs_to_all_tenants_is_for_who_may_name_every_salt() -> None:
    """Dead letters, stories and what-ifs: an operator alone, or whoever opens a console with an operator's token."""
    await readers().check_all(Reader("operator", ""))
    await readers(own="operator").check_all(Reader("", ""))
    for reader in (Reader("tenant", "a"), Reader("router", ""), Reader("", "")):
        with pytest.raises(NotForReaderError):
            await readers().check_all(reader)


async def test_a_scorer_that_is_away_takes_nothing_away_and_gives_nothing() -> None:
    """What was allowed stays so; who was never asked about is told that the scorer is away."""
    now, gone = [0.0], [False]
    found = readers(clock=lambda: now[0], away=lambda: gone[0])
    await found.check_all(Reader("operator", ""))
    now[0], gone[0] = 1e6, True
    await found.check_all(Reader("operator", ""))
    with pytest.raises(ClientError, match="UNAVAILABLE"):
        await found.check_all(Reader("tenant", ""))


def test_a_salt_s_name_tells_it_from_others_and_from_none() -> None:
    """Records name salts by a hash."""
    assert tenant_of("") == ""
    assert len({tenant_of("a"), tenant_of("b"), ""}) == 3
    assert "secret" not in tenant_of("secret")


@pytest.mark.parametrize("token", ["t" * 1_025, "\udcff", "a\nb", "\u00e9"])
def test_what_is_no_token_is_the_reader_s_error(token: str) -> None:
    """It reaches neither the scorer nor what is remembered of readers."""
    with pytest.raises(InputError, match="x-scorer-token"):
        Reader.of(token, "")
    with pytest.raises(InputError, match="x-cache-salt"):
        Reader.of("", "s" * 1_025)


async def test_what_is_remembered_of_readers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of tokens that nobody issued take no more memory, and no connection."""
    monkeypatch.setattr("kvatlas.deploy.console.readers._SEEN", 10)
    connected: list[int] = []

    def connect() -> AsyncScorerClient:
        connected.append(1)
        return cast("AsyncScorerClient", Scorer("", lambda: False))

    found = Readers(connect, lambda: 0.0)
    for number in range(100):
        with pytest.raises(NotForReaderError):
            await found.check_all(Reader(f"t{number}", ""))
    assert len(found._seen) == 10
    assert len(connected) == 1

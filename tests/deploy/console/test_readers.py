"""What readers may see, by the scorer's own rules about tokens, roles and salts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.block_key import tenant_of
from kvatlas.deploy.console.readers import NotForReaderError, Reader, Readers, request_of
from kvatlas.scorer.api.security import Caller, Guard
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError, ScorerError


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

    def __init__(self, token: str, away: Callable[[], bool]) -> None:
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._away = away

    def call(self, name: str, request: Any) -> str:
        """Answer a call that is allowed."""
        if self._away():
            raise ClientError("UNAVAILABLE", "nobody there")
        try:
            GUARD.admit(self._metadata, ROLE_OF[name]).check(request)
        except ScorerError as error:
            raise ClientError(code_of(error).name, str(error)) from error
        return name

    def close(self) -> None:
        """Nothing to close."""


def readers(
    own: str = "", clock: Callable[[], float] = lambda: 0.0, away: Callable[[], bool] = lambda: False
) -> Readers:
    """Readers of a console with a token of its own."""
    return Readers(lambda token: cast("ScorerClient", Scorer(token or own, away)), clock)


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


def test_a_question_is_token_ids_or_a_body() -> None:
    """A body goes to the scorer as it is, without the page's own fields; nonsense is named."""
    assert request_of({"model": "m", "tokens": [1, 2], "cache_salt": "s"}).cache_salt == "s"
    body = request_of({"model": "m", "messages": [{"role": "user", "content": "x"}], "at": "-1m"}).request_json
    assert "messages" in body
    assert "at" not in body.replace("message", "")
    for wrong in ({}, {"model": 3}, {"model": "m"}, {"model": "m", "tokens": "x"}, {"model": "m", "tokens": [-1]}):
        with pytest.raises(SettingsError):
            request_of(wrong)

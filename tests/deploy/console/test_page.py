"""The page's files, and who may open it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.console.options import ConsoleSettings, ScorerAddress, token_of

FOLDER = Path(__file__).parents[3] / "deploy" / "console"


def test_the_bundle_is_made_of_the_sources() -> None:
    """`make console` bundles the page anew after a change of its sources."""
    sources = [
        *(FOLDER / "web" / name for name in ("package.json", "package-lock.json")),
        *sorted((FOLDER / "web" / "src").glob("*.js")),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    assert (FOLDER / "static" / "sources.sha256").read_text().strip() == digest


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No address of another host, no inline script, no inline style: it works without internet and under its CSP."""
    page = (FOLDER / "static" / "index.html").read_text()
    assert "//" not in page.replace("<!doctype", "")
    assert "<style" not in page
    assert page.count("<script") == page.count('<script type="module" src="app.js">') == 1
    assert "style=" not in page
    bundle = (FOLDER / "static" / "app.js").read_text()
    assert "https://" not in bundle
    assert "eval(" not in bundle


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        *((listen, False) for listen in ("127.0.0.1:0", "localhost:1", "[::1]:1")),
        *((listen, True) for listen in ("0.0.0.0:1", "[::]:1", "console:1", ":1", "[::1", "localhost.example:1")),
    ],
)
def test_a_page_that_others_can_reach_asks_for_a_token(listen: str, told: bool) -> None:
    """On loopback alone there is none; elsewhere one is made, and told once."""
    token, made = token_of(ConsoleSettings(listen=listen))
    assert (bool(token), made) == (told, told)


def test_a_token_file_is_used_and_not_told(tmp_path: Path) -> None:
    """Also on loopback; an empty or missing file is an error that names it."""
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert token_of(ConsoleSettings(page_token_file=str(file))) == ("secret", False)
    file.write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        token_of(ConsoleSettings(page_token_file=str(file)))
    with pytest.raises(SettingsError, match="nothing"):
        token_of(ConsoleSettings(page_token_file=str(tmp_path / "nothing")))


def test_the_scorer_s_address_names_what_it_is_reached_with(tmp_path: Path) -> None:
    """A token, a CA and a certificate are files; what is none, or is not there, is an error that names it."""
    for name in ("t", "c", "k"):
        (tmp_path / name).write_text(f"{name}\n")
    assert ScorerAddress.of("h:1") == ScorerAddress("h:1")
    assert ScorerAddress.of(f"unix:/s,token={tmp_path}/t") == ScorerAddress("unix:/s", token="t")
    assert ScorerAddress.of("h:1,ca=system") == ScorerAddress("h:1", tls=True)
    found = ScorerAddress.of(f"h:1,ca={tmp_path}/c,cert={tmp_path}/c,key={tmp_path}/k")
    assert found == ScorerAddress("h:1", "", True, b"c\n", b"c\n", b"k\n")
    for wrong in ("h:1,cert=/x", "h:1,colour=red", "h:1,token=", "h:1,token=/nowhere/token"):
        with pytest.raises(SettingsError, match="scorer"):
            ScorerAddress.of(wrong)

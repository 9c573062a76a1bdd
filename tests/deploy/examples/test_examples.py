"""Every example runs, and shows what it is meant to show."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvatlas.deploy.examples import comparison, mirror, offline, pipeline, router
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool

TOKENIZER = Path(__file__).parents[2] / "data" / "tokenizer"


def test_offline(capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped recording gives scores of both recorded pods, the newest prompt's whole match first."""
    offline.main(["--prompts", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(not line.startswith(" ") for line in lines) == 3
    assert any(line.startswith("  pod-a: score") for line in lines)
    assert any(line.startswith("  pod-b: score") for line in lines)
    newest = lines.index(next(line for line in reversed(lines) if not line.startswith(" ")))
    tokens = int(lines[newest].split()[0])
    assert f"{tokens} tokens cached" in lines[newest + 1]


def test_an_example_as_a_command() -> None:
    """`python -m` runs it, from any folder."""
    done = subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy.examples.offline", "--prompts", "1"],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def test_every_example_has_a_page() -> None:
    """The index names every program, and its page says how it is run."""
    root = Path(__file__).parents[3]
    index = (root / "docs/examples/README.md").read_text(encoding="utf-8")
    programs = [path.stem for path in (root / "deploy/examples").glob("*.py") if "def main(" in path.read_text("utf-8")]
    assert len(programs) >= 5
    for name in programs:
        page = (root / "docs/examples" / f"{name}.md").read_text(encoding="utf-8")
        assert f"python -m kvatlas.deploy.examples.{name}" in page
        assert f"({name}.md)" in index


@pytest.mark.parametrize(
    ("example", "words", "text"),
    [
        (offline, ["nowhere.kvcap"], "nowhere.kvcap"),
        (router, ["--serve", "--tokenizer=nonsense"], "MODEL=DIR"),
        (pipeline, ["--brokers=127.0.0.1:1"], "no broker answers at 127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    example: Any, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong file, tokenizer or broker ends the program with its name, and without a traceback."""
    with pytest.raises(SystemExit) as ended:
        example.main(words)
    assert ended.value.code == 1
    assert text in capsys.readouterr().err


async def test_router_finds_the_cache() -> None:
    """The same conversations hit far more through the index than round robin."""
    blind = await router.cached_share(3, 80, precise=False)
    precise = await router.cached_share(3, 80, precise=True)
    assert precise > blind + 0.1


async def test_router_proxies_text_and_chats_and_goes_on_without_an_engine() -> None:
    """Text and chats are tokenized and scored; an engine that is gone is passed over; with none left it says so."""
    text = "a prefix that many people share before their own question comes " * 12
    settings = TokenizerSettings(models=(f"m={TOKENIZER}",))
    async with (
        TokenizerPool(settings) as pool,
        router.running(2, pool, model="m") as (url, engines),
        aiohttp.ClientSession() as session,
    ):

        async def ask(path: str, **body: object) -> tuple[int, str, int, dict[str, Any]]:
            async with session.post(url + path, json={"model": "m"} | body) as answer:
                content = await answer.json() if answer.status == 200 else {}
                pod, matched = answer.headers.get(router.POD_HEADER, ""), answer.headers.get(router.MATCHED_HEADER, 0)
                return answer.status, pod, int(matched), content

        _, pod, matched, first = await ask("/v1/completions", prompt=text)
        assert (matched, "text" in first["choices"][0]) == (0, True)
        asked = {pod}
        async with asyncio.timeout(90):  # until the engine's event is in the index
            while not matched:
                _, pod, matched, _ = await ask("/v1/completions", prompt=f"{text} and what is the answer")
                assert matched == 0 or pod in asked
                asked.add(pod)
        status, _, _, chat = await ask("/v1/chat/completions", messages=[{"role": "user", "content": text}])
        assert (status, chat["choices"][0]["message"]["role"]) == (200, "assistant")
        for engine in engines:
            if engine.pod == pod:
                await engine.stop()
        status, other, _, _ = await ask("/v1/completions", prompt=text)
        assert (status, other) == (200, next(engine.pod for engine in engines if engine.pod != pod))
        for engine in engines:
            await engine.stop()
        assert (await ask("/v1/completions", prompt=text))[0] == 503


async def test_precise_beside_approximate() -> None:
    """Knowing decisions beats knowing nothing, and knowing events is at least as good."""
    settings = SimPlan(sessions=16, system_prompts=8, system_tokens=512, output_tokens=200)
    requests = list(islice(traffic.requests(settings), 120))
    shares = {policy: await comparison.cached_share(policy, 3, 300, requests) for policy in comparison.POLICIES}
    assert shares["random"] + 0.1 < shares["approximate"]
    assert shares["approximate"] <= shares["precise"] + 0.05


async def test_pipeline_picks_the_cache() -> None:
    """Through bridge, broker, worker and scorer, picks find what the engines have cached."""
    share, reason = await pipeline.cached_share(3, 60)
    assert share > 0.5
    assert "tokens cached" in reason


async def test_mirror_finds_the_cache() -> None:
    """A router that reads nothing but the mirror in Redis finds what the engines have cached."""
    assert await mirror.cached_share(3, 60) > 0.5

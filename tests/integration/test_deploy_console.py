"""The console in a real browser, over `kvatlas up` and simulated engines that serve."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import ServedFleet
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.tokenization.options import TokenizerSettings
from tests.integration.pipeline_support import Service

MODELS = f"sim-model={Path(__file__).parents[1] / 'data' / 'tokenizer'}"
#: Where the pictures of docs/console.md go; elsewhere a test's own folder.
PICTURES = os.environ.get("PICTURES", "")
VIEWS = ("fleet", "prefixes", "ask", "decisions", "flow", "what-if")
PROMPTS = [" ".join(f"shared {group} {word}" for word in range(80)) for group in range(2)]


class Running:
    """A pipeline with a console, after some requests were routed."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(SimPlan(pods=2), clock=time.time, monotonic=time.monotonic)
        self.fleet.start()
        self.engines = ServedFleet(self.fleet, TokenizerSettings(models=[MODELS]))
        self.engines.start()
        flags = [word for address in self.engines.addresses.values() for word in ("--engine", f"http://{address}")]
        flags += [f"--state-dir={folder / 'state'}", "--scorer-listen=127.0.0.1:0", "--tokenizer-models", MODELS]
        self.up = Service(folder / "up.log", "up", *flags, "--console", "--console-listen=127.0.0.1:0")
        self.scorer = self.up.ready(180)
        found = re.search(r"console=(\S+)", self.up.line)
        assert found, self.up.line
        self.address = found[1]
        self.route()

    def route(self) -> None:
        """Send prompts that share prefixes, first to every pod, then where the scorer picks."""
        with ScorerClient(self.scorer, timeout_seconds=60) as client:
            for prompt in PROMPTS:
                for pod in self.engines.addresses:
                    self.send(pod, prompt)
            deadline = time.monotonic() + 60
            while len(client.score("sim-model", prompt=PROMPTS[1]).scores) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for number in range(8):
                request = score_request(
                    "sim-model", prompt=f"{PROMPTS[number % 2]} tail {number}", request_id=f"r-{number}"
                )
                self.send(client.pick(request, report=True).pod, f"{PROMPTS[number % 2]} tail {number}")

    def send(self, pod: str, prompt: str) -> None:
        """Let a pod complete a prompt."""
        body = json.dumps({"model": "sim-model", "prompt": prompt, "max_tokens": 2}).encode()
        url = f"http://{self.engines.addresses[pod]}/v1/completions"
        urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})).read()

    def close(self) -> None:
        """End everything."""
        self.up.close()
        self.engines.close()
        self.fleet.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One pipeline for all views."""
    made = Running(tmp_path_factory.mktemp("console"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The distribution's Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "no chromium on the path; `.ci/system-deps` installs it"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=flags)
        yield made
        made.close()


@pytest.fixture
def page(running: Running, browser: Browser) -> Iterator[Page]:
    """A page whose console stays silent."""
    made = browser.new_page(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(60_000)
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    made.close()
    assert said == []


def show(page: Page, running: Running, view: str) -> None:
    """Open a view and fill in what it asks for."""
    page.goto(f"{running.address}#{view}")
    expect(page.locator("main h2").first).to_be_visible(timeout=60_000)
    if view == "ask":
        page.fill("input[name=model]", "sim-model")
        page.fill("textarea[name=prompt]", PROMPTS[0])
        page.click("button.do")
        expect(page.get_by_role("heading", name="Now")).to_be_visible(timeout=60_000)
    if view == "what-if":
        page.click("button.do")
        expect(page.locator("td", has_text="shared")).to_be_visible(timeout=60_000)
    if view in ("fleet", "decisions"):
        expect(page.locator("tbody td").nth(1)).to_be_visible(timeout=60_000)


def cells(page: Page) -> list[list[str]]:
    """Return the texts of the first table's rows."""
    rows = page.locator("table").first.locator("tbody tr")
    return [rows.nth(at).locator("td").all_inner_texts() for at in range(rows.count())]


def asked(running: Running, path: str, body: Any = None) -> Any:
    """Return what the server itself answers."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{running.address}api/{path}", data)) as answer:
        return json.load(answer)


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_usable_by_everyone(view: str, running: Running, page: Page, tmp_path: Path) -> None:
    """No serious finding of axe, light and dark, wide and narrow; nothing is cut off at the side; pictures are kept."""
    folder = Path(PICTURES or tmp_path)
    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        show(page, running, view)
        found = Axe().run(page).response["violations"]
        serious = [(one["id"], one["help"]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], f"{view} {width} {scheme}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=folder / f"console-{view}-{width}.png")


def test_the_fleet_says_what_the_command_line_says(running: Running, page: Page) -> None:
    """Pods, state and model as `kvatlas pods` lists them."""
    show(page, running, "fleet")
    with ScorerClient(running.scorer, timeout_seconds=60) as client:
        listed = {(pod.pod, pod.state, pod.model) for pod in client.list_pods("sim-model")}
    assert {tuple(row[:3]) for row in cells(page)} == listed
    page.get_by_role("button", name="pod-0").click()
    expect(page.get_by_role("heading", name="Timeline")).to_be_visible()


def test_asking_gives_the_scorer_s_own_scores(running: Running, page: Page) -> None:
    """Score and matched tokens per pod, and a strip of blocks for each holder."""
    show(page, running, "ask")
    with ScorerClient(running.scorer, timeout_seconds=60) as client:
        scores = client.score("sim-model", prompt=PROMPTS[0]).scores
    assert {row[0]: int(row[2].replace(",", "")) for row in cells(page)} == {
        pod: score.matched_tokens for pod, score in scores.items()
    }
    expect(page.locator(".strip")).to_have_count(len(scores))


def test_decisions_and_prefixes_come_from_the_reported_requests(running: Running, page: Page) -> None:
    """Each reported request is a row; the prompts' common stretch was asked for as often as they were sent."""
    show(page, running, "decisions")
    expect(page.locator("td", has_text=re.compile(r"^r-7$"))).to_be_visible()
    assert {row[1] for row in cells(page)} == {f"r-{number}" for number in range(8)}
    page.fill("input[type=search]", "r-3")
    assert len(cells(page)) == 1
    tree = asked(running, "prefixes?minutes=60")
    assert [node["asked"] for node in tree["tree"]] == [4, 4]
    show(page, running, "prefixes")
    expect(page.locator(".tree.top > li")).to_have_count(2)


def test_a_bad_question_is_answered_with_what_is_wrong(running: Running) -> None:
    """Every wrong request is a sentence and a status of 400."""
    for path, body in (
        ("ask", {"prompt": "x"}),
        ("ask", {"model": "sim-model"}),
        ("ask", [1]),
        ("what-if", {"policies": []}),
        ("what-if", {"policies": ["no-such"]}),
        ("timeline?pod=p&since=yesterday-ish", None),
        ("decisions?after=x", None),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(running, path, body)
        assert caught.value.code == 400, path
        assert json.load(caught.value)["error"]
        assert "script-src 'self'" in caught.value.headers["content-security-policy"]


@pytest.mark.soak
def test_a_thousand_pods_and_a_hundred_decisions_a_second_keep_the_page_quick(running: Running, page: Page) -> None:
    """Half of the frames of the busiest views take less than 100 ms while everything changes."""
    pods = [
        {"pod": f"pod-{n}", "state": "live", "model": "m", "epoch": 1, "sequence": n, "messages_per_second": 1.5,
         "age_ms": 10.0, "lost": 0, "first_lost": -1, "last_lost": -1, "blocks": {"gpu": n}}
        for n in range(1000)
    ]  # fmt: skip
    picture = {"version": 1, "pods": pods, "workers": [], "scorers": [], "stores": {}, "unserved": []}
    numbers = itertools.count(1)
    row = {"model": "m", "pod": "pod-1", "policy": "pick", "blocks": 9, "block_size_tokens": 16, "outcome": ""}
    row |= {"predicted_tokens": 9, "scores": {}, "degraded": "", "served": None}

    def decisions(route: Any) -> None:
        made = [
            {**row, "number": at, "request_id": f"q-{at}", "decided_ms": at} for at in itertools.islice(numbers, 100)
        ]
        route.fulfill(json={"rows": made, "unreadable": 0})

    page.route("**/api/picture", lambda route: route.fulfill(json=picture))
    page.route("**/api/decisions*", decisions)
    for view in ("fleet", "decisions"):
        page.goto(f"{running.address}#{view}")
        expect(page.locator("tbody tr").nth(400)).to_be_attached(timeout=60_000)
        frames = page.evaluate(
            """() => new Promise((done) => {
                const times = []; let last = performance.now(); const end = last + 8000;
                function frame(now) {
                    times.push(now - last);
                    last = now;
                    now < end ? requestAnimationFrame(frame) : done(times);
                }
                requestAnimationFrame(frame);
            })"""
        )
        assert sorted(frames)[len(frames) // 2] < 100, view

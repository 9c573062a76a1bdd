"""The console in a real browser, over `kvatlas up` and simulated engines that serve."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from confluent_kafka import Producer
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kvatlas.bridge.model.records import DecisionRecord, encode
from kvatlas.deploy.brokers.embedded import PARTITIONS, EmbeddedBroker
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import ServedFleet
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.tokenization.options import TokenizerSettings
from tests.integration.pipeline_support import Service, children_of, eventually

MODELS = f"sim-model={Path(__file__).parents[1] / 'data' / 'tokenizer'}"
#: Where the pictures of docs/console.md go; elsewhere a test's own folder.
PICTURES = os.environ.get("PICTURES", "")
VIEWS = ("fleet", "prefixes", "ask", "decisions", "flow", "what-if")
expect.set_options(timeout=90_000)
PROMPTS = [" ".join(f"shared {group} {word}" for word in range(80)) for group in range(2)]


class Running:
    """A pipeline with a console, after some requests were routed."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(SimPlan(pods=2), clock=time.time, monotonic=time.monotonic)
        self.fleet.start()
        self.engines = ServedFleet(self.fleet, TokenizerSettings(models=[MODELS]))
        self.engines.start()
        flags = [word for address in self.engines.addresses.values() for word in ("--engine", f"http://{address}")]
        self.broker = EmbeddedBroker()
        self.broker.start()
        self.kafka = [f"--brokers={self.broker.bootstrap}", f"--partitions={PARTITIONS}", "--replication=1"]
        flags += [
            *self.kafka,
            f"--state-dir={folder / 'state'}",
            "--scorer-listen=127.0.0.1:0",
            "--tokenizer-models",
            MODELS,
        ]
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
            deadline = time.monotonic() + 90
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
        self.broker.stop()


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
    made.set_default_timeout(90_000)
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    made.close()
    assert said == []


def show(page: Page, running: Running, view: str) -> None:
    """Open a view and fill in what it asks for."""
    page.goto(f"{running.address}#{view}")
    expect(page.locator("main h2").first).to_be_visible()
    if view == "ask":
        page.fill("input[name=model]", "sim-model")
        page.fill("textarea[name=prompt]", PROMPTS[0])
        page.click("button.do")
        expect(page.get_by_role("heading", name="Now")).to_be_visible()
    if view == "what-if":
        page.click("button.do")
        expect(page.locator("tbody th", has_text="shared")).to_be_visible()
        expect(page.get_by_role("heading", name="Time to first token")).to_be_visible()
    if view in ("fleet", "decisions"):
        expect(page.locator("tbody td").nth(1)).to_be_visible()


def cells(page: Page) -> list[list[str]]:
    """Return the texts of the first table's rows."""
    rows = page.locator("table").first.locator("tbody tr")
    return [rows.nth(at).locator("th, td").all_inner_texts() for at in range(rows.count())]


def asked(running: Running, path: str, body: Any = None) -> Any:
    """Return what the server itself answers."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{running.address}api/{path}", data)) as answer:
        return json.load(answer)


def said(*words: str) -> list[Any]:
    """Return what a `kvatlas` command prints as JSON lines."""
    done = subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def usable(page: Page, where: str) -> None:
    """No serious finding of axe, and nothing is cut off at the side."""
    found = Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == [], where
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), where


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_usable_by_everyone(view: str, running: Running, page: Page, tmp_path: Path) -> None:
    """No serious finding of axe, light and dark, wide and narrow; nothing is cut off at the side; pictures are kept."""
    folder = Path(PICTURES or tmp_path)
    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        show(page, running, view)
        usable(page, f"{view} {width} {scheme}")
        page.screenshot(path=folder / f"console-{view}-{width}.png")


def test_the_fleet_is_what_the_command_line_says(running: Running, page: Page) -> None:
    """Pods, state, model and blocks as `kvatlas pods` and `kvatlas top` list them; a pod's timeline begins with it."""
    show(page, running, "fleet")
    (top,) = said("top", "--once", "--json", "--every=0.2", *running.kafka[:1])
    pods = said("pods", "--scorer", running.scorer, "--json")
    assert {tuple(row[:3]) for row in cells(page)} == {(pod["pod"], pod["state"], pod["model"]) for pod in pods}
    blocks = {pod["pod"]: f"{pod['blocks'].get('gpu', 0):,}" for pod in top["pods"]}
    expect(page.locator("tbody tr")).to_have_count(len(blocks))
    eventually(lambda: {row[0]: row[3] for row in cells(page)} != blocks)
    assert {row[0]: row[3] for row in cells(page)} == blocks
    page.get_by_role("button", name="pod-0").click()
    expect(page.get_by_role("heading", name="Timeline")).to_be_visible()
    expect(page.locator("td", has_text=re.compile("^start$"))).to_be_visible()
    expect(page.get_by_role("heading", name="pod-0")).to_be_focused()
    usable(page, "a pod")
    page.get_by_role("button", name="all pods").click()
    order = page.get_by_role("button", name="Pod", exact=True)
    order.click()
    expect(page.locator("tbody th").first).to_have_text("pod-1")
    order.click()
    expect(page.locator("tbody th").first).to_have_text("pod-0")


def test_asking_gives_the_scorer_s_own_answer(running: Running, page: Page) -> None:
    """Scores, blocks and ends as `kvatlas explain` has them, and a cost of each pod that is the picker's own."""
    show(page, running, "ask")
    (told,) = said("explain", "--scorer", running.scorer, "--model=sim-model", "--json", "--prompt", PROMPTS[0])
    rows = {row[0]: row for row in cells(page)}
    assert {pod: (int(row[2].replace(",", "")), row[5]) for pod, row in rows.items()} == {
        pod: (told["scored"]["scores"][pod]["matched_tokens"], end["reason"]) for pod, end in told["walks"].items()
    }
    expect(page.locator(".strip")).to_have_count(len(rows))
    answer = asked(running, "ask", {"model": "sim-model", "prompt": PROMPTS[0]})
    assert answer["explain"]["blocks"][0]["key"] == told["blocks"][0]["key"]
    for cost in answer["costs"]["pods"]:
        assert cost["compute"] == answer["score"]["prompt_tokens"] - cost["held_tokens"]
        assert cost["total"] == cost["compute"] + cost["queued"] + cost["decode"] + cost["full"]
    expect(page.get_by_role("region", name="Costs").locator("tbody tr")).to_have_count(2)


def test_a_past_moment_stands_beside_now(running: Running, page: Page) -> None:
    """The slider goes from the log's beginning to now; before the first event nothing was held, at the end what is."""
    page.goto(f"{running.address}#ask")
    page.fill("input[name=model]", "sim-model")
    page.fill("textarea[name=prompt]", json.dumps([{"role": "user", "content": PROMPTS[0]}]))
    page.fill("textarea[name=prompt]", PROMPTS[0])
    page.check("input[name=past]")
    page.check("input[name=second]")
    slider = page.locator("input[name=moment-0]")
    slider.evaluate(
        """(slider) => { slider.value = slider.min; slider.dispatchEvent(new Event("change", { bubbles: true })); }"""
    )
    page.click("button.do")
    expect(page.get_by_role("heading", name="As of")).to_have_count(2)
    gained = page.get_by_role("region", name="Differences").locator("tbody tr")
    expect(gained).to_have_count(2)
    page.get_by_role("button", name="What changed on the pods").click()
    expect(page.get_by_role("region", name="Changes").locator("tbody tr")).to_have_count(2)
    usable(page, "past moments")
    (told,) = said("tokenize", "--scorer", running.scorer, "--model=sim-model", "--json", "--prompt", PROMPTS[0])
    tokens = ",".join(map(str, told["tokens"]))
    moment = f"@{time.time():.3f}"
    (at,) = said("at", moment, "explain", "--model=sim-model", "--tokens", tokens, "--json", *running.kafka[:1])
    (scores,) = said("at", moment, "score", "--model=sim-model", "--tokens", tokens, "--json", *running.kafka[:1])
    then = asked(running, "ask", {"model": "sim-model", "prompt": PROMPTS[0], "at": moment})
    assert (then["scores"], then["blocks"], then["walks"]) == (scores["scores"], at["blocks"], at["walks"])
    assert len(then["scores"]) == 2
    assert asked(running, "ask", {"model": "sim-model", "prompt": PROMPTS[0], "at": "@1"})["scores"] == {}
    changed = said("diff", "earliest", moment, "--json", *running.kafka[:1])
    assert asked(running, f"diff?first=earliest&second={moment}")["pods"] == changed
    assert all(pod["added"] for pod in changed)


def test_decisions_and_prefixes_come_from_the_reported_requests(running: Running, page: Page) -> None:
    """Each reported request is a row, with the story that `kvatlas why` tells; prompts' common text is shown."""
    show(page, running, "decisions")
    expect(page.locator("tbody th", has_text=re.compile(r"^r-7$"))).to_be_visible()
    assert {row[0] for row in cells(page)} == {f"r-{number}" for number in range(8)}
    served = DecisionRecord(kind="served", request_id="r-7", pod="pod-0", cached_tokens=1_600, first_token_ms=12.5)
    producer = Producer({"bootstrap.servers": running.broker.bootstrap})
    producer.produce("kv-decisions", key=b"r-7", value=encode(served))
    assert producer.flush(90) == 0
    told_later = page.get_by_role("region", name="Decisions").locator("tr", has_text="r-7").locator("td")
    expect(told_later.nth(3)).to_have_text("1,600")
    expect(told_later.nth(4)).to_have_text("12.5 ms")
    page.fill("input[type=search]", "r-3")
    expect(page.get_by_role("region", name="Decisions").locator("tbody tr")).to_have_count(1)
    page.get_by_role("button", name="r-3").click()
    page.get_by_role("button", name="The whole story").click()
    expect(page.locator(".reasons")).to_be_visible()
    usable(page, "a story")
    (told,) = said("why", "r-3", "--json", *running.kafka[:1])
    assert asked(running, "why?request=r-3") == told
    tree = asked(running, "prefixes?minutes=60")
    assert [node["asked"] for node in tree["tree"]] == [4, 4]
    show(page, running, "prefixes")
    stretches = page.get_by_role("region", name="Stretches").locator("tbody tr")
    expect(stretches).to_have_count(len(tree["tree"]) + sum(len(node["children"]) for node in tree["tree"]))
    expect(page.locator("div.scroll > .icicle > li > button")).to_have_count(2)
    page.locator("div.scroll > .icicle > li > button").first.click()
    page.get_by_role("button", name="Its text, and who holds it now").click()
    expect(page.locator("pre.text")).to_contain_text("shared")
    held = page.get_by_role("region", name="Stretch", exact=True).locator("li", has_text="hold all of it on gpu now")
    expect(held).to_contain_text("2 pods")
    usable(page, "a stretch")
    page.get_by_role("button", name="Ask about it").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("region", name="Costs").locator("tbody tr")).to_have_count(2)
    assert {row[2] for row in cells(page)} == {f"{tree['tree'][0]['blocks'] * 16:,}"}


def test_what_if_is_what_the_command_line_says(running: Running, page: Page) -> None:
    """Hit ratios and times to first token over the same decisions, and the page shows them."""
    body = {"policies": ["precise:1", "shared"], "queueing": ["kvatlas:2", "random"], "since": "earliest"}
    answer = asked(running, "what-if", body)
    flags = ["--decisions", "--json", *running.kafka[:1]]
    rows = said("whatif", *body["policies"], *flags)
    assert answer["rows"] == rows
    assert answer["first_tokens"] == said("whatif", "--queueing", *body["queueing"], *flags)
    show(page, running, "what-if")
    shown = {row[0]: row for row in cells(page)}
    for row in rows:
        if row["policy"] in shown:
            _, requests, hit_ratio, *_ = shown[row["policy"]]
            assert int(requests.replace(",", "")) == row["requests"]
            assert float(hit_ratio.removesuffix(" %")) == pytest.approx(100 * row["hit_ratio"], abs=0.06)
    assert {"precise:1", "shared"} <= shown.keys()


def test_flow_shows_topics_owners_and_dead_letters(running: Running, page: Page) -> None:
    """What a producer sent that is no message is a dead letter, read with its value and saved."""
    producer = Producer({"bootstrap.servers": running.broker.bootstrap})
    producer.produce("kv-events", key=b"pod-0", value=b"no message")
    assert producer.flush(90) == 0
    show(page, running, "flow")
    page.select_option("select", label="1h ago")
    row = page.get_by_role("region", name="Dead letters").locator("tbody tr").first
    eventually(lambda: not asked(running, "dead-letters?since=-1h")["letters"])
    page.select_option("select", label="15m ago")
    row.get_by_role("button", name="show").click()
    expect(page.get_by_role("region", name="Value").locator("pre").last).to_contain_text(b"no message".hex(" "))
    usable(page, "dead letters")
    with page.expect_download() as saved:
        page.get_by_role("button", name=re.compile("^Export")).click()
    letters = [json.loads(line) for line in Path(saved.value.path()).read_text().splitlines()]
    assert bytes.fromhex(letters[-1]["hex"]) == b"no message"
    (top,) = said("top", "--once", "--json", "--every=0.2", *running.kafka[:1])
    workers = page.get_by_role("region", name="Workers").locator("tbody tr")
    assert [workers.nth(at).locator("th, td").all_inner_texts()[:2] for at in range(workers.count())] == [
        [worker["worker"], worker["endpoint"]] for worker in top["workers"]
    ]
    served = sum(len(worker["partitions"]) for worker in top["workers"])
    expect(page.locator("summary", has_text="Partitions of kv-blocks")).to_contain_text(f"{served} of {served} served")
    topics = {row["topic"]: row for row in asked(running, "topics")["topics"]}
    assert topics["kv-events"]["records"] > 0
    assert all(not row["error"] for row in topics.values())


def test_a_console_that_dies_is_started_again_where_it_was(running: Running) -> None:
    """After SIGKILL the page is at the same address, with the decisions of before, and says why it was away."""
    child = children_of(running.up.process.pid)["console"]
    os.kill(child, signal.SIGKILL)

    def away() -> bool:
        try:
            return len(asked(running, "decisions")["rows"]) < 8
        except OSError:
            return True

    assert not eventually(away)
    assert children_of(running.up.process.pid)["console"] != child
    assert "SIGKILL" in asked(running, "topics")["restarts"]


def test_a_bad_question_is_answered_with_what_is_wrong(running: Running) -> None:
    """Every wrong request is a sentence and a status of 400."""
    for path, body in (
        ("ask", {"prompt": "x"}),
        ("ask", {"model": "sim-model"}),
        ("ask", [1]),
        ("what-if", {"policies": []}),
        ("what-if", {"policies": ["no-such"]}),
        ("what-if", {"queueing": ["no-such"]}),
        ("timeline?pod=p&since=yesterday-ish", None),
        ("dead-letters?since=soon", None),
        ("diff?first=latest&second=earliest", None),
        ("diff?second=-1h", None),
        ("stretch?key=abc", None),
        ("ask", {"model": "sim-model", "prompt": "x", "at": "soon"}),
        ("decisions?after=x", None),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(running, path, body)
        assert caught.value.code == 400, path
        assert json.load(caught.value)["error"]
        assert "script-src 'self'" in caught.value.headers["content-security-policy"]
    elsewhere = urllib.request.Request(f"{running.address}api/picture", headers={"host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(elsewhere)


def test_the_demonstration_is_kept_with_its_console(tmp_path: Path, browser: Browser) -> None:
    """`kvatlas demo --keep --console` prints the page's address; requests go where picks send them; SIGTERM ends it.

    With a token's file nothing is told without the token. Its pictures are those of docs/console.md.
    """
    (tmp_path / "token").write_text("the-token\n")
    words = ["demo", "--keep", "--console", "--seconds=1", "--prompts=2", f"--state-dir={tmp_path}"]
    words.append(f"--console-page-token-file={tmp_path / 'token'}")
    with subprocess.Popen([sys.executable, "-m", "kvatlas.deploy", *words], stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        try:
            ready = next(line for line in demo.stdout if line.startswith("ready "))
            address = re.search(r"console=(http://127\.0\.0\.1:\d+/)", ready)
            assert address, ready

            def idle() -> bool:
                asked = urllib.request.Request(
                    f"{address[1]}api/decisions", headers={"authorization": "Bearer the-token"}
                )
                with urllib.request.urlopen(asked) as answer:
                    return not json.load(answer)["rows"]

            assert not eventually(idle)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{address[1]}api/picture")
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(90_000)
            page.goto(address[1])
            page.fill("input[name=token]", "another")
            page.click("button.do")
            expect(page.get_by_role("alert")).to_contain_text("missing or wrong")
            usable(page, "locked")
            page.fill("input[name=token]", "the-token")
            page.click("button.do")
            expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
            for view in VIEWS:
                if view == "ask":  # about the prefix that is asked for most
                    page.locator(".icicle button").first.click()
                    for name in ("Its text, and who holds it now", "Ask about it", "Ask"):
                        page.get_by_role("button", name=name, exact=True).click()
                else:
                    page.goto(f"{address[1]}#{view}")
                if view == "what-if":
                    page.get_by_role("button", name="Simulate").click()
                expect(page.locator("tbody tr").nth(5)).to_be_attached()
                page.screenshot(path=Path(PICTURES or tmp_path) / f"console-demo-{view}.png")
            page.close()
            demo.send_signal(signal.SIGTERM)
            assert demo.wait(90) == 0
            assert "kvatlas demo: ok" in demo.stdout.read()
        finally:
            demo.kill()


def test_a_thousand_pods_and_a_hundred_decisions_a_second_keep_the_page_quick(running: Running, page: Page) -> None:
    """Taking in an answer costs the page's thread less than 100 ms of processor time, so no frame waits for longer.

    How long frames take by the clock is the machine's matter too: a busy one has them late whatever the page does.
    """
    numbers = itertools.count(1)
    row = {"model": "m", "pod": "pod-1", "policy": "pick", "blocks": 9, "block_size_tokens": 16, "outcome": ""}
    row |= {"predicted_tokens": 9, "scores": {}, "degraded": "", "served": None}
    answers = Counter[str]()

    def picture(route: Any) -> None:
        answers["fleet"] += 1
        made = [a_pod(number, answers["fleet"]) for number in range(1000)]
        route.fulfill(json={"version": 1, "pods": made, "workers": [], "scorers": [], "stores": {}, "unserved": []})

    def decisions(route: Any) -> None:
        answers["decisions"] += 1
        made = [
            {**row, "number": at, "request_id": f"q-{at}", "decided_ms": at} for at in itertools.islice(numbers, 100)
        ]
        route.fulfill(json={"log": "one", "rows": made, "unreadable": 0})

    page.route("**/api/picture", picture)
    page.route("**/api/decisions*", decisions)
    inside = page.context.new_cdp_session(page)
    inside.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked() -> float:
        found = {one["name"]: one["value"] for one in inside.send("Performance.getMetrics")["metrics"]}
        return 1000 * float(found["TaskDuration"])

    for view in ("fleet", "decisions"):
        page.goto(f"{running.address}#{view}")
        expect(page.locator(".more")).to_contain_text("100 of")
        known, before = answers[view], worked()
        deadline = time.monotonic() + 90
        while answers[view] < known + 3 and time.monotonic() < deadline:
            page.wait_for_timeout(200)
        each = (worked() - before) / (answers[view] - known)
        assert 0 < each < 100, f"{view}: {each:.0f} ms"


def a_pod(number: int, look: int) -> dict[str, Any]:
    """A pod of which each look tells something else."""
    load = {"running": look % 7, "waiting": number % 3, "cache_usage": (number + look) % 100 / 100}
    return {
        "pod": f"pod-{number}", "state": "live", "model": "m", "epoch": 1, "sequence": look, "age_ms": 10.0 * look,
        "messages_per_second": 1.5 + look, "lost": 0, "first_lost": -1, "last_lost": -1,
        "blocks": {"gpu": number + look}, "load": load, "coverage": "whole",
    }  # fmt: skip

"""Templates of requests cost their own process, never this one; large bodies are read beside the event loop."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvatlas.scorer.errors import BusyError, InputError, TooLargeError
from kvatlas.scorer.tokenization import aside
from kvatlas.scorer.tokenization.errors import TemplateError, TemplateLimitError, TokenizerBackendError
from kvatlas.scorer.tokenization.limits import TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import ChatInput

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
USER = {"role": "user", "content": "Hi"}
MIB = 2**20

#: What a template can do to a process that looks at the clock between its steps only.
ATTACKS = {
    "text in nested sets": "{% set a %}{{ 'x' * 9999 }}{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 40,
    "in chain": "{% set a = range(99999) | list %}" + "{% if 'x' in a %}{% endif %}" * 9000,
    "list repetition": "{% set a = [0] * 4000000 %}" + "{% set a = a + a %}" * 12,
    "nested lists": "{% set a = [[[0] * 999] * 999] * 999 %}{{ a | string | length }}",
    "pprint": "{{ ([[1, 2, 3]] * 400000) | pprint | length }}",
    "sort": "{{ (range(99999) | list * 40) | sort | length }}",
    "tests without loops": "{% set a = 'a' * 3000000 %}" + "{{ 'b' in a }}" * 9000,
    "alias chain": "{% set a = 'x' * 2000000 %}" + "{% set a = a ~ a ~ a ~ a %}" * 8,
    "indent": "{{ ('x\n' * 2000000) | indent(9999) | length }}",
    "tojson indent": "{{ ([[1]] * 500000) | tojson(indent=9999) | length }}",
    "wordwrap": "{{ ('x ' * 2000000) | wordwrap(1) | length }}",
    "format width": "{{ ('%9999d' * 9999) % ((1,) * 9999) | length }}",
    "constants at compile time": "{{ 'x' * 9999999 * 1 }}" * 2000,
    "deep nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "unicode": "{{ ('\u00e9' * 9000000) | upper | lower | title | length }}" * 200,
}


def _pool(**limits: Any) -> TokenizerPool:
    settings = TokenizerSettings(models=(f"m={FOLDER}",), request_templates=True)
    return TokenizerPool(
        settings, limits=TokenizerLimits(**{"template_seconds": 0.5, "template_wait_seconds": 90.0, **limits})
    )


@pytest.fixture
async def pool() -> AsyncIterator[TokenizerPool]:
    """A pool that takes templates of requests, whose renderings may take half a second and 128 MiB."""
    async with _pool(template_memory_bytes=128 * MIB, template_wait_seconds=120.0) as made:
        yield made


async def test_off_unless_turned_on() -> None:
    """A request's own template is refused by default, and nothing is started for it."""
    async with TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",))) as pool:
        with pytest.raises(InputError, match="request_templates"):
            await pool.render_chat("m", ChatInput([USER], chat_template="{{ 1 }}"))


async def test_the_text_is_the_template_s(pool: TokenizerPool) -> None:
    """A template of the request gets messages, tools, arguments and special tokens as the model's own does."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ tools[0].function.name }}{{ word }}\u00e9"
    )
    chat = ChatInput([USER], tools=[{"function": {"name": "f"}}], chat_template=template, kwargs={"word": "w"})
    assert (await pool.render_chat("m", chat)).text == "<|bos|>Hifw\u00e9"
    with pytest.raises(TemplateError, match="no"):
        await pool.render_chat("m", ChatInput([USER], chat_template="{{ raise_exception('no') }}"))
    with pytest.raises(TemplateError):
        await pool.render_chat("m", ChatInput([USER], chat_template="{% if %}"))


@pytest.mark.parametrize("name", ATTACKS)
async def test_no_template_takes_more_than_its_limits(name: str, pool: TokenizerPool) -> None:
    """Whatever it does, it ends with an error or a small text; this process neither grows nor computes for it."""
    before, spent = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    try:
        text = (await pool.render_chat("m", ChatInput([USER], chat_template=ATTACKS[name]))).text
        assert len(text) < 16 * MIB
    except (TemplateLimitError, TemplateError):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_maxrss - before.ru_maxrss) * 1024 < 100 * MIB
    assert time.process_time() - spent < 5
    # And the next one is rendered as if nothing had been.
    assert (await pool.render_chat("m", ChatInput([USER], chat_template="{{ 1 + 1 }}"))).text == "2"


async def test_others_are_tokenized_beside_templates_that_never_end() -> None:
    """While templates burn their limits, prompts of others and the event loop go on."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with _pool(template_seconds=3.0) as pool:
        await pool.encode("m", "warm")
        burning = [
            asyncio.create_task(pool.encode_chat("m", ChatInput([USER], chat_template=endless))) for _ in range(4)
        ]
        waits = []
        for number in range(100):
            began = time.perf_counter()
            await pool.encode("m", f"the router {number}")
            waits.append(time.perf_counter() - began)
        still = [task for task in burning if not task.done()]
        assert still  # they were at it all the time
        for task in burning:
            task.cancel()
        await asyncio.gather(*burning, return_exceptions=True)
    assert sorted(waits)[98] < 0.1


async def test_few_wait_and_more_are_refused() -> None:
    """Requests with templates of their own do not pile up."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with _pool(template_seconds=2.0, template_wait_seconds=2.0) as pool:
        found = await asyncio.gather(
            *(pool.render_chat("m", ChatInput([USER], chat_template=endless)) for _ in range(20)),
            return_exceptions=True,
        )
    refused = [one for one in found if isinstance(one, BusyError)]
    assert sum("wait already" in str(one) for one in refused) == 12
    assert len(refused) + sum(isinstance(one, TemplateLimitError) for one in found) == 20


@pytest.fixture
def beside() -> Iterator[aside.Aside]:
    """A process of one second and 128 MiB."""
    made = aside.Aside(processes=1, cpu_seconds=1.0, memory_bytes=128 * MIB, answer_bytes=MIB, what="work")
    yield made
    for child in _children():
        os.kill(child, 9)


def _children() -> list[int]:
    """Return the processes of ours that do work aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == os.getpid() and b"aside_child" in command:
            found.append(int(folder.name))
    return found


def test_a_process_serves_many_and_is_replaced_when_it_dies(beside: aside.Aside) -> None:
    """What ends the process is an error of one piece of work; the next one gets a new process."""
    body = b"\n" + b'{"prompt": "x"}'
    for _ in range(3):
        assert beside.run(aside.READ_BODY, body, timeout_seconds=60)
    for child in _children():
        os.kill(child, 9)
    with pytest.raises((TooLargeError, TokenizerBackendError)):
        beside.run(aside.READ_BODY, body, timeout_seconds=60)
    assert beside.run(aside.READ_BODY, body, timeout_seconds=60)


def test_limits_of_work_are_told(beside: aside.Aside) -> None:
    """Processor time, memory, the answer's size and the wait each end the work with their name."""
    with pytest.raises(TooLargeError, match="too much"):
        beside.run(aside.READ_BODY, b'\n{"prompt": "' + b"x" * 2 * MIB + b'"}', timeout_seconds=60)
    with pytest.raises(TooLargeError, match="memory"):
        beside.run(aside.READ_BODY, b'\n{"messages": [' + b"[]," * 4_000_000 + b"[]]}", timeout_seconds=60)
    with pytest.raises(InputError, match="not JSON"):
        beside.run(aside.READ_BODY, b"\n{", timeout_seconds=60)
    with pytest.raises(TooLargeError, match="longer than 0 s"):
        beside.run(aside.READ_BODY, b"\n{}", timeout_seconds=0)


def test_the_end_does_not_wait_for_work(beside: aside.Aside) -> None:
    """Closing ends what is under way, however long it would have taken."""
    body = b'\n{"messages": [' + b"[]," * 400_000 + b"[]]}"
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(beside.run, aside.READ_BODY, body * 1, timeout_seconds=60)
        while not _children():
            time.sleep(0.01)
        began = time.monotonic()
        beside.close()
        with pytest.raises((TooLargeError, TokenizerBackendError, InputError)):
            running.result()
    assert time.monotonic() - began < 90
    assert not _children()


def test_a_closed_one_starts_nothing(beside: aside.Aside) -> None:
    """After the end there is an error, not a process that nobody ends."""
    closed = aside.Aside(processes=1, cpu_seconds=1.0, memory_bytes=MIB, answer_bytes=MIB, what="work")
    closed.close()
    with pytest.raises(TokenizerBackendError, match="shutting down"):
        closed.run(aside.READ_BODY, b"\n{}", timeout_seconds=1)

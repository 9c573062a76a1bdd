"""``kvatlas score``, ``explain`` and ``pods`` against a scorer that answers over real gRPC."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.records import GONE
from kvatlas.deploy.cli.entry import main
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
PROMPT = "The router keeps the prefix of every prompt, and that is what these words are for. " * 8


class Terminal:
    """Runs commands against the rig's scorer, in a thread, as a user would."""

    def __init__(self, rig: Rig, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.rig, self.address, self._capsys = rig, address, capsys

    async def run(self, *words: str) -> tuple[int, str, str]:
        """Run a command; returns its exit code, output and errors."""
        self._capsys.readouterr()
        code = await asyncio.to_thread(main, [words[0], f"--scorer={self.address}", *words[1:]])
        out, err = self._capsys.readouterr()
        return code, out, err

    async def answers(self, folder: Path, *requests: Any, command: str = "score") -> list[Any]:
        """Return what ``--json`` prints for requests, one line each."""
        file = folder / "requests.jsonl"
        file.write_text("\n".join(json.dumps(request) for request in requests) + "\n\n", encoding="utf-8")
        code, out, err = await self.run(command, "--model=m", f"--input={file}", "--json")
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
async def terminal(capsys: pytest.CaptureFixture[str]) -> Any:
    """A scorer with one worker, pods a (10 blocks) and b (4 blocks), and a tokenizer for model m."""
    pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
    rig = Rig(pool=pool)
    async with rig.stack:
        rig.pod("a", 10)
        rig.pod("b", 4)
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        yield Terminal(rig, await rig.serve(), capsys)
        await rig.router.close()
    pool.close()


def _blocks(answer: Any) -> dict[str, int]:
    return {pod: entry["matched_blocks"] for pod, entry in answer["scores"].items()}


async def test_json_answers_come_one_a_line_in_order(terminal: Terminal, tmp_path: Path) -> None:
    """Each line of the input has its answer at the same place, with scores and freshness."""
    found = await terminal.answers(
        tmp_path, {"tokens": TOKENS}, {"tokens": TOKENS[:70]}, {"tokens": [1, 2]}, {"tokens": TOKENS[:32]}
    )
    assert [_blocks(answer) for answer in found] == [{"a": 10, "b": 4}, {"a": 4, "b": 4}, {}, {"a": 2, "b": 2}]
    first = found[0]["scores"]["b"]
    assert (first["score"], first["matched_blocks"], first["matched_tokens"]) == (4.0, 4, 64)
    assert found[0]["freshness"]["partial"] is False
    assert {part["applied_offset"] for part in found[0]["freshness"]["partitions"]} == {"7"}
    assert found[0]["freshness"]["pods"]["a"]["last_sequence"] == "3"
    assert found[2]["freshness"] == {"partial": False, "standby": False, "partitions": [], "pods": {}}


async def test_salt_adapter_and_pods_of_a_request_count(terminal: Terminal, tmp_path: Path) -> None:
    """Blocks of a tenant or an adapter are found with its salt or name alone; `pods` narrows the answer."""
    for salt, lora, count in (("tenant", None, 3), (None, "sql", 5), ("tenant", "sql", 6)):
        terminal.rig.hold("b", block_keys(root_key("m", lora, salt), pack_tokens(TOKENS), 16)[:count])
    found = await terminal.answers(
        tmp_path,
        {"tokens": TOKENS, "cache_salt": "tenant"},
        {"tokens": TOKENS, "lora": "sql"},
        {"tokens": TOKENS, "lora": "sql", "cache_salt": "tenant"},
        {"tokens": TOKENS, "cache_salt": "other"},
        {"tokens": TOKENS, "cache_salt": None, "lora": None, "pods": ["b"]},
        {"tokens": TOKENS, "model": "another"},
    )
    assert [_blocks(answer) for answer in found] == [{"b": 3}, {"b": 5}, {"b": 6}, {}, {"b": 4}, {}]


async def test_a_prompt_is_tokenized_as_the_engine_does(terminal: Terminal, tmp_path: Path) -> None:
    """Text scores as its token ids do, from a line and from the flag."""
    tokens = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(PROMPT).ids
    whole = len(tokens) // 16
    assert whole > 3
    terminal.rig.hold("b", block_keys(root_key("m"), pack_tokens(tokens), 16)[:3])
    by_text, by_tokens = await terminal.answers(tmp_path, {"prompt": PROMPT}, {"tokens": tokens})
    assert _blocks(by_text) == _blocks(by_tokens) == {"b": 3}
    assert by_text["prompt_tokens"] == len(tokens)
    code, out, _ = await terminal.run("score", "--model=m", f"--prompt={PROMPT}", "--json")
    assert (code, _blocks(json.loads(out))) == (0, {"b": 3})


async def test_requests_are_read_from_standard_input(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --input requests come from standard input; without --json people can read the answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"tokens": TOKENS}) + "\n"))
    code, out, _ = await terminal.run("score", "--model=m")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "160 tokens, 10 blocks of 16"
    assert [line.split() for line in lines[1:]] == [
        ["a", "10.00", "160", "tokens", "gpu=10"],
        ["b", "4.00", "64", "tokens", "gpu=4"],
    ]


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("{", 2, "requests.jsonl:2: not JSON"),
        ("[1]", 2, "requests.jsonl:2: not a request"),
        ('{"tokenz": [1]}', 2, "requests.jsonl:2: body: has neither prompt nor messages"),
        ('{"tokens": [-1]}', 2, "requests.jsonl:2: "),
        ('{"tokens": [1.5]}', 2, "requests.jsonl:2: "),
        ('{"tokens": [1], "pods": "ab"}', 2, "requests.jsonl:2: pods: a list"),
        ('{"tokens": [1], "cache_salt": 5}', 2, "requests.jsonl:2: "),
        ('{"tokens": [1], "prompt": "x"}', 2, "requests.jsonl:2: not a request; beside tokens known fields are"),
        ('{"prompt": []}', 1, "INVALID_ARGUMENT: {folder}/requests.jsonl:2: prompt: a text or a list"),
        ('{"prompt": "x", "model": "unknown"}', 1, "NOT_FOUND: {folder}/requests.jsonl:2: "),
    ],
)
async def test_a_bad_line_ends_the_command_with_its_place(
    terminal: Terminal, tmp_path: Path, line: str, code: int, text: str
) -> None:
    """Answers before a bad line are printed, then the error names file and line; wrong input 2, refusals 1."""
    file = tmp_path / "requests.jsonl"
    good = json.dumps({"tokens": TOKENS})
    file.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    ended, out, err = await terminal.run("score", "--model=m", f"--input={file}", "--json")
    assert (ended, len(out.splitlines())) == (code, 1)
    assert text.format(folder=tmp_path) in err
    assert err.startswith("kvatlas score: ")
    assert "Traceback" not in err


async def test_what_cannot_be_read_or_reached_is_said(terminal: Terminal, tmp_path: Path) -> None:
    """Missing and binary files, half a key pair and a scorer that is not there each have a one-line reason."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\n")
    for flags, code, text in (
        ((f"--input={tmp_path / 'none'}",), 2, "none: No such file"),
        ((f"--input={binary}",), 2, "not UTF-8"),
        ((f"--token-file={tmp_path / 'none'}",), 2, "--token-file"),
        ((f"--tls-certfile={binary}",), 2, "go together"),
        (("--prompt=x", "--scorer=127.0.0.1:1", "--timeout=5"), 1, "UNAVAILABLE: --prompt: "),
    ):
        ended, out, err = await terminal.run("score", "--model=m", *flags)
        assert (ended, out) == (code, "")
        assert text in err
        assert len(err.splitlines()) == 1


async def test_explain_tells_holders_and_where_walks_end(terminal: Terminal, tmp_path: Path) -> None:
    """Every block with its holders, and per pod how far it holds the prompt and why no further."""
    (found,) = await terminal.answers(tmp_path, {"tokens": TOKENS}, command="explain")
    assert [len(block.get("holders", ())) for block in found["blocks"]] == [2] * 4 + [1] * 6
    assert found["walks"]["b"] == {"matched_blocks": 4, "reason": "block 4: not held on any tier"}
    file = tmp_path / "requests.jsonl"
    code, out, _ = await terminal.run("explain", "--model=m", f"--input={file}")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("block     0 ")
    assert lines[3].endswith(": a gpu, b gpu")
    assert lines[4].endswith(": a gpu")
    assert lines[11] == "b: 4 blocks; block 4: not held on any tier"


async def test_pods_lists_what_the_scorer_knows(terminal: Terminal) -> None:
    """One line a pod; those of other models and those gone only when asked for."""
    terminal.rig.pod("c", 0, state=GONE)
    code, out, _ = await terminal.run("pods")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["a", "live", "m"], ["b", "live", "m"]]
    _, out, _ = await terminal.run("pods", "--all", "--json")
    pods = [json.loads(line) for line in out.splitlines()]
    assert [(pod["pod"], pod["state"], pod["last_sequence"]) for pod in pods] == [
        ("a", "live", "3"),
        ("b", "live", "3"),
        ("c", "gone", "3"),
    ]
    _, out, _ = await terminal.run("pods", "--model=another", "--json")
    assert out == ""


async def test_lines_are_the_bodies_that_clients_send(terminal: Terminal, tmp_path: Path) -> None:
    """Chats with tools, items beside token ids, Anthropic bodies by their url, and lines of a batch file score."""
    chat = {
        "messages": [{"role": "user", "content": PROMPT}],
        "tools": [{"function": {"name": "f"}}],
        "temperature": 0.5,
    }
    anthropic = {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], "system": "Be brief."}
    lines = [
        chat,
        {"custom_id": "1", "method": "POST", "url": "/v1/messages", "body": {**anthropic, "model": "m"}},
        {"tokens": TOKENS, "multimodal": [{"identifier": "picture", "offset": 16, "length": 4}]},
        {"prompt": [1, 2, 3]},
    ]
    for_chat, by_url, pictured, ids = await terminal.answers(tmp_path, *lines)
    assert for_chat["prompt_tokens"] > by_url["prompt_tokens"] > 100
    assert _blocks(pictured) == {"a": 1, "b": 1}
    assert ids["prompt_tokens"] == 3
    made = await terminal.answers(tmp_path, *lines, command="tokenize")
    assert [one["count"] for one in made] == [answer["prompt_tokens"] for answer in (for_chat, by_url, pictured, ids)]
    assert made[0]["text"].startswith("<|bos|><|im_start|>system")
    assert "Be brief." in made[1]["text"]
    assert made[3]["tokens"] == [1, 2, 3]
    code, out, _ = await terminal.run("tokenize", "--model=m", "--prompt=the router")
    assert code == 0
    assert out.splitlines()[0] == "4 tokens by the local tokenizer: 0 89 263 661"


async def test_a_path_is_for_all_lines(terminal: Terminal, tmp_path: Path) -> None:
    """--path says of which API the bodies are; one that is none is told with the line."""
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "system": "s"}))
    code, out, _ = await terminal.run("tokenize", f"--input={file}", "--path=/v1/messages", "--json")
    assert (code, "system\ns" in json.loads(out)["text"]) == (0, True)
    code, _, err = await terminal.run("tokenize", f"--input={file}", "--path=/v1/audio")
    assert (code, f"{file}:1" in err, "request_path" in err) == (1, True, True)

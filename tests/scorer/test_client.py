"""Requests of the client: chats keep every field that a template may read."""

from __future__ import annotations

from typing import Any

from kvatlas.scorer.api.inputs import chat_input
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.options import ScorerSettings
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "ö"}], "name": "n"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "so"},
    {"role": "tool", "content": "3", "tool_call_id": "c"},
]


def test_a_chat_arrives_as_it_was_given() -> None:
    """Parts, tool calls, names, absent contents, fields of one's own, tools, documents and arguments all arrive."""
    tools, documents = [{"name": "f"}], [{"title": "T"}]
    request = score_request(
        "m", messages=MESSAGES, tools=tools, documents=documents, template_kwargs={"enable_thinking": False}
    )
    chat = chat_input(request.chat, ScorerSettings())
    assert list(chat.messages) == MESSAGES
    assert (chat.tools, chat.documents, chat.kwargs) == (tools, documents, {"enable_thinking": False})
    assert score_request("m", messages=[]).HasField("chat")


async def test_the_client_has_every_operation(rig: Rig) -> None:
    """Batches, choices, explanations and decisions have methods of their own, async as well as blocking."""
    rig.pod("a", 10)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()
    one = score_request("m", tokens=TOKENS, request_id="r")
    assert [len(answer.scores) for answer in await client.score_batch([one, one])] == [1, 1]
    assert (await client.pick(one, report=True)).pod == "a"
    assert (await client.explain("m", tokens=TOKENS)).walks["a"].matched_blocks == 10
    assert (await client.report_decision("r", "a")).blocks == 10
    for name in ("score", "score_batch", "pick", "explain", "report_decision", "list_pods", "watch_pods"):
        assert callable(getattr(ScorerClient, name))

"""``kvatlas pods``: one line a pod."""

from __future__ import annotations

import pytest

from kvatlas.deploy.commands import pods
from kvatlas.scorer.v1 import scorer_pb2 as pb


@pytest.mark.parametrize(
    ("coverage", "heard_from", "end"),
    [("whole", 0, " whole"), ("partial", 6, " partial from 6"), ("", 0, " unknown")],
)
def test_a_line_ends_with_what_is_known_of_the_engine(
    coverage: str, heard_from: int, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, partial with the first sequence that is known, or not known."""
    pods._print(pb.PodInfo(pod="p", age_ms=-1, coverage=coverage, heard_from=heard_from), as_json=False)
    assert capsys.readouterr().out.rstrip("\n").endswith(end)

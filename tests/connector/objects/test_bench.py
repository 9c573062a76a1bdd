"""The object cases of ``kvatlas bench offload`` on a real server."""

from __future__ import annotations

from kvatlas.connector.objects.client import connect
from kvatlas.deploy.bench._offload_s3 import s3_cases
from tests.connector.objects.conftest import S3Server


def test_the_object_cases_move_every_block_and_leave_nothing(s3: S3Server) -> None:
    """Stores and loads of both sizes are figures beside the client's own, and no block stays in the bucket."""
    settings = s3.settings()
    figures = list(s3_cases(settings.url, megabytes=32, rounds=1, threads=2, settings=settings))
    assert [figure["case"] for figure in figures] == ["s3-store-2MB", "s3-load-2MB", "s3-store-16MB", "s3-load-16MB"]
    assert all(figure["value"] > 0 and figure["baseline"] > 0 for figure in figures)
    assert not [item for item in connect(settings).list("") if item.size_bytes >= 1 << 20]

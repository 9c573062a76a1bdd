"""The S3 server of the object tier's tests, for engines over a bucket."""

from __future__ import annotations

from tests.connector.objects.conftest import s3

__all__ = ["s3"]

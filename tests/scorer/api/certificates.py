"""Certificates for tests of TLS: a CA, and pairs that it signed."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """A certificate authority in a folder; every file is PEM."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.key, self.certificate = folder / "ca.key", folder / "ca.pem"
        _openssl("req", "-x509", *_new(self.key), "-days", "2", "-subj", "/CN=Test CA", "-out", str(self.certificate))

    def pair(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key of a new pair for 127.0.0.1 and localhost."""
        request, key, certificate = (self._folder / f"{name}.{end}" for end in ("csr", "key", "pem"))
        names = self._folder / "names.cnf"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n", encoding="utf-8")
        _openssl("req", *_new(key), "-subj", f"/CN={name}", "-out", str(request))
        signer = ("-CA", str(self.certificate), "-CAkey", str(self.key), "-CAcreateserial")
        out = ("-days", "2", "-extfile", str(names), "-out", str(certificate))
        _openssl("x509", "-req", "-in", str(request), *signer, *out)
        return certificate, key


def _new(key: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key))


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)

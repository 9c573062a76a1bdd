"""Writes docs/api.md from the proto files: services, messages and the comments beside them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

PROTOS: Final = (
    "scorer/v1/scorer.proto",
    "streams/v1/block_index.proto",
    "scorer/v1/indexer.proto",
    "scorer/v1/tokenization.proto",
)
_RPC: Final = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)")
_FIELD: Final = re.compile(r"((?:repeated |optional )?(?:map<[^>]+>|[\w.]+)) (\w+) = (\d+);(?:\s*//\s*(.*))?")
_OPEN: Final = re.compile(r"(service|message|enum|oneof) (\w+) \{")


def render(root: Path) -> str:
    """Return the page for the protos below ``root``."""
    parts = [
        "# API reference",
        "",
        "Generated from the proto files by `python -m kvatlas.deploy.docs_api docs/api.md`; edit those instead.",
    ]
    for name in PROTOS:
        parts += ["", f"## {name}", "", *_file((root / name).read_text(encoding="utf-8"))]
    return "\n".join(parts) + "\n"


def _file(text: str) -> list[str]:
    lines: list[str] = []
    notes: list[str] = []
    table = False
    for line in (raw.strip() for raw in text.splitlines()):
        if line.startswith("//"):
            notes.append(line.removeprefix("//").strip())
            continue
        said = " ".join(notes)
        if match := _OPEN.match(line):
            if match[1] != "oneof":
                lines += ["", f"### {match[1]} `{match[2]}`", "", *([said, ""] if said else [])]
                table = False
        elif match := _RPC.match(line):
            lines.append(f"- `{match[1]}({match[2]})` returns {match[3] or ''}`{match[4]}`. {said}".rstrip())
        elif match := _FIELD.match(line):
            if not table:
                lines += ["| field | type | number | meaning |", "|---|---|---|---|"]
                table = True
            lines.append(f"| `{match[2]}` | `{match[1]}` | {match[3]} | {' '.join(filter(None, (said, match[4])))} |")
        elif line.startswith("package") and said:
            lines += [said, ""]
        if line:
            notes = []
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(Path(__file__).resolve().parent.parent), encoding="utf-8")

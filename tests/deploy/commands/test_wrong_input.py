"""What is given wrong to a command: exit code 2 and a text that names it, before anything is read or written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kvatlas.deploy.cli.entry import main

CAPTURE = str(Path(__file__).parents[3] / "deploy" / "examples" / "demo.kvcap")


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command; returns its exit code and what it said."""
    try:
        code = main(words)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay", "--from", "{folder}/none"], "none cannot be read: No such file"),
        (["replay", "--from", CAPTURE, "--to", "{folder}/none/x"], "--to {folder}/none/x: No such file"),
        (["replay", "--from", CAPTURE, "--to", "{folder}/file/x"], "--to {folder}/file/x: Not a directory"),
        (["replay", "--from", CAPTURE, "--since", "soon"], "'soon' is no moment"),
        (["replay", "--from", CAPTURE, "--since", "seq:3"], "exactly one --pod"),
        (["replay", "--from", CAPTURE, "--topic", "kv-blocks"], "give --topic kv-events"),
        (["replay", "--from", CAPTURE, "--limit", "-3"], "--limit: '-3'"),
        (["replay", "--from", CAPTURE, "--speed", "nan"], "--speed: 'nan'"),
        (["replay", "--from", CAPTURE, "--model", "m", "--tokens", "1,-2"], "'-2' is no token id"),
        (["replay", "--from", CAPTURE, "--model", "m", "--tokens", "4294967296"], "'4294967296' is no token id"),
        (["replay", "--block-size-tokens", "0"], "--block-size-tokens: '0'"),
        (["replay", "--topic", "kv-blocks", "--model", "m"], "--model is no filter of kv-blocks; there are: --key"),
        (["replay", "--topic", "kv-decisions", "--type", "stored"], "--type is no filter of kv-decisions"),
        (["at", "soon", "pods"], "'soon' is no moment"),
        (["at", "seq:4", "pods"], "'seq:4' is no moment"),
        (["at", "@1e400", "pods"], "'@1e400' is no moment"),
        (["at", "latest", "pods", "--snapshots", "{folder}/none"], "--snapshots {folder}/none: no such folder"),
        (["at", "latest", "save", "--snapshots", "{folder}/file/x"], "--snapshots {folder}/file/x: Not a directory"),
        (["at", "latest", "score", "--model", "m", "--tokens", "x"], "'x' is no token id"),
        (["at", "latest", "score", "--model", "m", "--input", "{folder}/negative"], "negative line 1"),
        (["diff", "soon", "latest"], "'soon' is no moment"),
        (["why", "r", "--after", "-1"], "--after: '-1'"),
        (["whatif", "--decisions", "--since", "soon"], "'soon' is no moment"),
        (["whatif", "recorded", "--trace", "{folder}/trace"], "'recorded' needs --decisions"),
        (["whatif", "precise", "--trace", "{folder}/none"], "none: [Errno 2]"),
        (["whatif", "precise", "--trace", "{folder}/trace", "--blocks-per-second", "0"], "--blocks-per-second: '0'"),
        (["top", "--json"], "--json needs --once"),
        (["top", "--every", "0"], "--every: '0'"),
        (["evictor", "{folder}/file"], "file is a file"),
        (["evictor", "{folder}", "--interval", "-1"], "--interval: '-1'"),
        (["evictor", "{folder}", "--max-percent", "0"], "--max-percent: '0'"),
        (["reindex", "start", "v2", "--block-size-tokens", "-1"], "--block-size-tokens: '-1'"),
        (["sim", "--pods", "1", "--engines-file", "{folder}/none/x"], "engines_file {folder}/none/x"),
    ],
)
def test_it_is_named(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text has the flag or the file and what is wrong with it."""
    (tmp_path / "file").touch()
    (tmp_path / "negative").write_text('{"tokens": [-1]}\n')
    (tmp_path / "trace").write_text('{"timestamp":1,"input_length":512,"output_length":1,"hash_ids":[1]}\n')
    before = sorted(tmp_path.iterdir())
    code, text = failure([word.format(folder=tmp_path) for word in words], capsys)
    assert code == 2, text
    assert said.format(folder=tmp_path) in text
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_no_capture_is_damaged_and_not_misused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, another gzip file and a capture cut short each end with exit code 1 and the file's name."""
    (tmp_path / "text").write_text("hello")
    (tmp_path / "other").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "cut").write_bytes(Path(CAPTURE).read_bytes()[:200])
    for name in ("text", "other", "cut"):
        code, text = failure(["replay", "--from", str(tmp_path / name)], capsys)
        assert code == 1
        assert f"{tmp_path / name}: not a complete capture" in text


def test_a_broker_without_a_folder_it_can_use_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 before a JVM is started."""
    (tmp_path / "file").touch()
    code, text = failure(["broker", "start", "--port", "0", "--data-dir", str(tmp_path / "file")], capsys)
    assert code == 1
    assert f"--data-dir {tmp_path / 'file'} cannot be used" in text

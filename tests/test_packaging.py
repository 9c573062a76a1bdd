"""The packages as they are shipped: what is listed, who imports whom, what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("bridge", "streams", "scorer", "connector", "deploy")
#: Package -> packages of ours that it may import.
ARROWS = {
    "bridge": {"bridge"},
    "streams": {"bridge", "streams"},
    "scorer": {"bridge", "streams", "scorer"},
    "connector": {"bridge", "connector"},
    "deploy": set(TOP),
}


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    """Top packages of ours that a file imports, at whatever depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the package in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("kvatlas.")}


def test_every_package_folder_is_listed() -> None:
    """A folder with an __init__.py that pyproject does not list would be silently absent from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "kvatlas." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in TOP
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found


def test_every_code_folder_is_a_package() -> None:
    """A folder with Python files and no __init__.py would be silently absent as well."""
    assert [str(path) for top in TOP for path in _modules(top) if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("package", TOP)
def test_imports_point_upstream(package: str) -> None:
    """No module imports a package downstream of its own."""
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in _modules(package)
        if (bad := (_imported(path) & set(TOP)) - ARROWS[package])
    }
    assert wrong == {}


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    """The reader of imports finds each form, also inside a function."""
    file = tmp_path / "module.py"
    file.write_text(
        "import kvatlas.deploy.cli.entry\ndef f():\n    from kvatlas import scorer\n    from kvatlas.streams import x\n"
    )
    assert _imported(file) == {"deploy", "scorer", "streams"}


def test_formats_need_neither_sockets_nor_kafka() -> None:
    """Importing the formats, the adapters and the block keys loads no zmq and no Kafka client."""
    code = (
        "import sys, kvatlas.bridge.model.events, kvatlas.bridge.model.records, kvatlas.bridge.model.block_key\n"
        "import kvatlas.bridge.model.adapters.vllm, kvatlas.bridge.model.adapters.sglang\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'zmq', 'aiokafka', 'faust', 'confluent_kafka'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_constraints_name_packages_only() -> None:
    """The lock holds exact versions: no address, no path, no editable install."""
    lines = [line for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines() if line]
    assert lines == sorted(lines, key=str.lower)
    assert [line for line in lines if line.count("==") != 1 or any(mark in line for mark in (" ", "/", "@"))] == []


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """A wheel has all modules and all data that the code reads from its own folders."""
    source = tmp_path / "source"
    # A build writes beside its sources: it gets a copy, of what git would hand to a clone.
    paths = [*TOP, "pyproject.toml", "*.md", "LICENSE"]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    files = [name for name in listed if name and (ROOT / name).is_file()]
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("kvatlas-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ends = (".py", ".pyi", ".proto", ".typed", "pom.xml", "log4j2.properties", ".js", ".css", ".svg", ".html")
    wanted = {
        f"kvatlas/{name}"
        for name in files
        if name.split("/")[0] in TOP and name.endswith(ends) and "console/web/" not in name
    }
    assert wanted - inside == set()

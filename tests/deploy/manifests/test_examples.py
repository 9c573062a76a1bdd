"""The vLLM example: manifests whose JSON, ports, labels and paths agree with bridge, chart and connector."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from kvatlas.bridge.engines.identity import parse_topic
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.vllm.version import SUPPORTED

ROOT: Final = Path(__file__).parents[3]
FOLDER: Final = ROOT / "deploy/examples/vllm"
CHART: Final = ROOT / "deploy/helm/kvatlas"

Config = dict[str, Any]


def manifests() -> list[Config]:
    return [item for item in yaml.safe_load_all((FOLDER / "engine.yaml").read_text(encoding="utf-8")) if item]


def engine_pod() -> Config:
    (deployment,) = [item for item in manifests() if item["kind"] == "Deployment"]
    pod: Config = deployment["spec"]["template"]
    return pod


def from_manifest() -> dict[str, Config]:
    (container,) = engine_pod()["spec"]["containers"]
    pairs = [argument.removeprefix("--").partition("=") for argument in container["args"]]
    return {name: json.loads(value.replace("$(POD_NAME)", "vllm-0")) for name, _, value in pairs if value[:1] == "{"}


def from_script(tmp_path: Path) -> dict[str, Config]:
    """Run the script with a `vllm` that prints its arguments."""
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(FOLDER / "serve.sh")],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "POD": "vllm-0",
            "MODEL": "org/model",
            "KV_ROOT": str(tmp_path / "kv"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\0")
    return {name.removeprefix("--"): json.loads(value) for name, value in itertools.pairwise(words) if value[:1] == "{"}


@pytest.fixture(params=["engine.yaml", "serve.sh"])
def flags(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Config]:
    return from_manifest() if request.param == "engine.yaml" else from_script(tmp_path)


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_schemas(version: str) -> None:
    """Every object of the example is valid, with no unknown field."""
    for item in manifests():
        kubernetes_validate.validate(item, version, strict=True)


def test_events(flags: dict[str, Config]) -> None:
    """The engine binds both sockets, offers replay, and its topic tells pod and model."""
    events = flags["kv-events-config"]
    known = {
        "enable_kv_cache_events",
        "publisher",
        "endpoint",
        "replay_endpoint",
        "buffer_steps",
        "hwm",
        "max_queue_size",
        "topic",
    }
    assert set(events) <= known
    assert (events["enable_kv_cache_events"], events["publisher"]) == (True, "zmq")
    # vLLM connects to any other address, and nobody would listen there.
    assert events["endpoint"].startswith("tcp://*:")
    assert events["replay_endpoint"].startswith("tcp://*:")
    named = parse_topic(events["topic"].encode())
    assert named is not None
    pod, model = named
    assert pod == "vllm-0"
    assert model in ("Qwen/Qwen3-8B", "org/model")


def test_connector(flags: dict[str, Config]) -> None:
    """The transfer configuration names a class that the connector has, with settings that it takes."""
    transfer = flags["kv-transfer-config"]
    assert set(transfer) == {"kv_connector", "kv_role", "kv_connector_extra_config"}
    extra = transfer["kv_connector_extra_config"]
    (tier,) = extra["secondary_tiers"]
    package, _, module = tier["module_path"].rpartition(".")
    assert package == "kvatlas.connector"
    named_module = ast.parse((ROOT / "connector" / f"{module}.py").read_text(encoding="utf-8"))
    (where,) = [node.module for node in named_module.body if isinstance(node, ast.ImportFrom) and node.module]
    tree = ast.parse((ROOT / f"{where.removeprefix('kvatlas.').replace('.', '/')}.py").read_text(encoding="utf-8"))
    (manager,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == tier["type"]]
    (init,) = [node for node in manager.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    named = {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}
    budget = {key: tier[key] for key in ("max_bytes", "max_percent", "high_watermark", "low_watermark") if key in tier}
    DiskBudget(**{"max_bytes": None, "max_percent": 80.0, "high_watermark": 0.95, "low_watermark": 0.85, **budget})
    rest = set(tier) - {"type", "module_path", "numa_node"} - named - set(budget)
    FileTierSettings(root=Path(tier["root_dir"]), **{key: tier[key] for key in rest})


def test_hashes_agree() -> None:
    """All engines use one hash algorithm and seed, and the connector's folder is named after that algorithm."""
    (container,) = engine_pod()["spec"]["containers"]
    chosen = next(a.partition("=")[2] for a in container["args"] if a.startswith("--prefix-caching-hash-algo"))
    assert from_manifest()["kv-transfer-config"]["kv_connector_extra_config"]["hash_algorithm"] == chosen
    assert any(entry["name"] == "PYTHONHASHSEED" and entry.get("value") for entry in container["env"])


def test_ports_and_folders() -> None:
    """Ports are those of the event sockets and of the chart's values, and the root of the files is a mount."""
    (container,) = engine_pod()["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    events = from_manifest()["kv-events-config"]
    values = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
    assert events["endpoint"].endswith(f":{ports['kv-events']}")
    assert events["replay_endpoint"].endswith(f":{ports['kv-replay']}")
    assert (values["engines"]["port"], values["engines"]["replayPort"]) == (ports["kv-events"], ports["kv-replay"])
    tier = from_manifest()["kv-transfer-config"]["kv_connector_extra_config"]["secondary_tiers"][0]
    assert tier["root_dir"] in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_values() -> None:
    """The chart takes the example's values, and the selector of the bridge's settings picks the example's pods."""
    values = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="kvatlas", namespace="serving")
    texts = "".join(text for path, text in files.items() if path.endswith("configmaps.yaml"))
    (selector,) = re.findall(r"kubernetes_selector = [\"'](.*)[\"']", texts)
    assert dict([selector.split("=")]).items() <= engine_pod()["metadata"]["labels"].items()
    (container,) = engine_pod()["spec"]["containers"]
    block = next(int(a.partition("=")[2]) for a in container["args"] if a.startswith("--block-size"))
    assert block % values["settings"]["worker"]["block_size_tokens"] == 0


def test_image() -> None:
    """The example's image starts from a vLLM release that the connector supports and copies what exists."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    (major, minor), *_ = re.findall(r"FROM vllm/vllm-openai:v(\d+)\.(\d+)", text)
    assert (int(major), int(minor)) in SUPPORTED
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(re.findall(r"COPY (\w+) /src/\1", text)) == set(packages.values())

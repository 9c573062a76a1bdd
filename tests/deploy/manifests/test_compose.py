"""Container image and compose file: what they name exists, and what they set is what the commands take."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from kvatlas.bridge.engines.discovery import static_specs
from kvatlas.bridge.options import BridgeSettings
from kvatlas.deploy.brokers.jars import kafka_version
from kvatlas.deploy.cli import common, entry
from kvatlas.deploy.sim.options import SimPlan

ROOT: Final = Path(__file__).parents[3]
FOLDER: Final = ROOT / "deploy/container"
DOCKERFILE: Final = FOLDER / "Dockerfile"
COMPOSE: Final = FOLDER / "compose.yaml"
OURS: Final = ("topics", "bridge", "worker-0", "worker-1", "scorer", "picker", "engines")


def interpolated(value: Any) -> Any:
    """Put the defaults of ${NAME:-default} in, as compose does where nothing is set."""
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    return [interpolated(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    document = interpolated(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")))
    assert set(document["volumes"]) == {
        volume.partition(":")[0]
        for service in document["services"].values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    found: dict[str, dict[str, Any]] = document["services"]
    return found


def dockerfile() -> list[tuple[str, str]]:
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines)]


def test_hadolint() -> None:
    """The Dockerfile linter finds nothing."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_two_stages_and_no_root() -> None:
    """The image is built in one stage and run from another, by a numbered user that is not root."""
    steps = dockerfile()
    assert [rest.rpartition(" AS ")[2] for word, rest in steps if word == "FROM"] == ["build", "run"]
    (user,) = [rest for word, rest in steps if word == "USER"]
    assert all(int(part) > 0 for part in user.split(":"))
    assert next(rest for word, rest in steps if word == "ENTRYPOINT") == '["kvatlas"]'
    assert any(word == "HEALTHCHECK" for word, _ in steps)


def test_copied_files_exist_and_travel() -> None:
    """Everything that is copied into the image is in the repository and let through by its ignore file."""
    let_through = {
        line[1:]
        for line in (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line[:1] == "!"
    }
    copies = [rest.split()[:-1] for word, rest in dockerfile() if word == "COPY" and "--from" not in rest]
    for source in (name for names in copies for name in names):
        tracked = subprocess.run(
            ["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert tracked, f"{source} is not in the repository"
        assert source in let_through or source.partition("/")[0] in let_through
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(packages.values()) <= {name for names in copies for name in names}


def test_installed_extras_exist() -> None:
    """The image installs extras that the package has, and no torch, no test tool."""
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text(encoding="utf-8"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known) - {"dev", "all", "torch", "manifests"}


def sections_of(service: dict[str, Any]) -> dict[str, Any]:
    """Load the settings of a service as its process does."""
    command, *arguments = service["command"]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"kvatlas.deploy.commands.{command}").add_arguments(parser)
    environ = {"KVATLAS_CONFIG": str(FOLDER / "kvatlas.toml"), **service.get("environment", {})}
    return common.load_sections(parser.parse_args(arguments), environ=environ)


@pytest.mark.parametrize("name", OURS)
def test_settings_load(services: dict[str, dict[str, Any]], name: str) -> None:
    """Command, environment and settings file of each service are ones that the command takes."""
    assert services[name]["command"][0] in entry.available()
    sections = sections_of(services[name])
    if "kafka" in sections:
        assert sections["kafka"].brokers == "kafka:9092"


def test_image_settings_name_known_settings() -> None:
    """The settings file of the image has no unknown section or setting and binds every interface."""
    document = common.read_document(FOLDER / "kvatlas.toml", {})
    for name, values in document.items():
        loaded = common.settings.load(name, common.section_class(name), document=document)
        for key, value in values.items():
            assert getattr(loaded, key) == value
            if key.endswith("listen"):
                assert value.startswith("0.0.0.0:")
    exposed = next(rest.split() for word, rest in dockerfile() if word == "EXPOSE")
    ports = {value.rpartition(":")[2] for part in document.values() for key, value in part.items() if "listen" in key}
    assert ports == set(exposed)


def test_health_checks(services: dict[str, dict[str, Any]]) -> None:
    """Each service that stays has a health check; ours ask the port that serves /readyz."""
    for name, service in services.items():
        check = service["healthcheck"]
        if name in ("topics", "engines"):
            assert check == {"disable": True}
        elif name in OURS:
            part = service["command"][0]
            section = sections_of(service)[part]
            listen = section.listen if part == "bridge" else section.telemetry_listen
            assert f":{listen.rpartition(':')[2]}/readyz" in check["test"][-1]
            compile(check["test"][-1], name, "exec")
        else:
            assert check["test"][0] == "CMD"


def test_ours_are_confined(services: dict[str, dict[str, Any]]) -> None:
    """Our containers write nowhere but to their volumes and keep no capability; ports stay on this machine."""
    for name in OURS:
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["build"]["dockerfile"] == "deploy/container/Dockerfile"
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert len({port.split(":")[1] for port in published}) == len(published)


def test_workers_do_not_share_tables(services: dict[str, dict[str, Any]]) -> None:
    """Each worker has a volume of its own, mounted where its settings keep the tables, and its own name."""
    folders, names = set(), set()
    for name in ("worker-0", "worker-1"):
        settings = sections_of(services[name])["worker"]
        (volume,) = services[name]["volumes"]
        assert volume.partition(":")[2] == settings.state_dir
        assert settings.advertise == services[name]["hostname"]
        folders.add(volume.partition(":")[0])
        names.add(settings.advertise)
    assert len(folders) == len(names) == 2


def test_bridge_finds_the_simulated_pods(services: dict[str, dict[str, Any]]) -> None:
    """The bridge's endpoints are the ports that the simulated fleet binds."""
    bridge: BridgeSettings = sections_of(services["bridge"])["bridge"]
    sim = SimPlan.of(sections_of(services["engines"])["sim"])
    ports = [
        (f"tcp://engines:{p}", f"tcp://engines:{p + 1}") for p in range(sim.base_port, sim.base_port + 2 * sim.pods, 2)
    ]
    assert [(spec.live, spec.replay) for spec in static_specs(bridge)] == ports
    assert [spec.pod for spec in static_specs(bridge)] == [f"{sim.pod_prefix}{number}" for number in range(sim.pods)]
    assert sim.host == "0.0.0.0"


def test_kafka(services: dict[str, dict[str, Any]]) -> None:
    """The broker has the version that the tests run, makes no topics by chance, and is reached where ours look."""
    kafka = services["kafka"]
    assert kafka["image"] == f"apache/kafka:{kafka_version()}"
    environment = kafka["environment"]
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    listeners = dict(item.split("://") for item in environment["KAFKA_LISTENERS"].split(","))
    protocols = dict(item.split(":") for item in environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert set(listeners) == set(protocols)
    assert environment["KAFKA_INTER_BROKER_LISTENER_NAME"] in listeners
    advertised = dict(item.split("://") for item in environment["KAFKA_ADVERTISED_LISTENERS"].split(","))
    assert advertised["INSIDE"] == "kafka:9092"
    assert {name: address.rpartition(":")[2] for name, address in advertised.items()} == {
        name: address.rpartition(":")[2] for name, address in listeners.items() if name != "CONTROLLER"
    }


def test_mounted_files_exist(services: dict[str, dict[str, Any]]) -> None:
    """Every file of the repository that a service mounts is there; scraped targets are services of ours."""
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).is_file()
    document = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {target for job in document["scrape_configs"] for c in job["static_configs"] for target in c["targets"]}
    assert targets == {f"{name}:9464" for name in OURS if name not in ("topics", "engines")}


def test_grafana_shows_the_dashboard(services: dict[str, dict[str, Any]]) -> None:
    """Grafana's data source points at the Prometheus of the file and its provider at the mounted dashboard."""
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources.yaml").read_text(encoding="utf-8"))["datasources"]
    host, _, port = source["url"].partition("://")[2].partition(":")
    assert host in services
    assert any(published.endswith(f":{port}") for published in services[host]["ports"])
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in services["grafana"]["volumes"]}
    assert json.loads((FOLDER / mounts[home]).read_text(encoding="utf-8"))["uid"] == "kvatlas"


def test_envoys_configuration_is_what_the_gateway_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The mounted file is made by the command that the compose file names."""
    command = next(line for line in COMPOSE.read_text().splitlines() if "kvatlas gateway" in line)
    assert entry.main(command.partition("`kvatlas ")[2].partition("`")[0].split()) == 0
    assert (FOLDER / "envoy.yaml").read_text() == capsys.readouterr().out

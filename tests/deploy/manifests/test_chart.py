"""The Helm chart: rendered by Helm's own SDK, checked against the Kubernetes schemas and against our settings."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.topics import TOPICS, changelog_topics
from kvatlas.deploy.brokers.topics import topic_config
from kvatlas.deploy.cli import common
from kvatlas.deploy.gateway.envoy import find_envoy

ROOT: Final = Path(__file__).parents[3]
CHART: Final = ROOT / "deploy/helm/kvatlas"
PARTS: Final = ("bridge", "worker", "scorer")
KUBERNETES: Final = ("1.29", "1.32", kubernetes_validate.latest_version())

EVERYTHING: Final[dict[str, Any]] = {
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {
        "kafka": {"security_protocol": "SASL_SSL", "topic_prefix": "Prod_", "replication": 3},
        "bridge": {"message_bytes": 33554432, "dns": ["tcp://other:5557"]},
        "worker": {"app": "atlas", "cache_bytes": 2147483648, "strict_gaps": True, "session_timeout_seconds": 4.5},
        "scorer": {"weight_cpu": 0.7, "models": ["m:strategy=longest-prefix"]},
    },
    "engines": {
        "selector": {"app": "vllm"},
        "discovery": "dns",
        "namespace": "engines",
        "replayPort": 5657,
        "options": "dp=2,store=default",
    },
    "kafkaAuth": {"secret": "kafka-user", "workerSecret": "kafka-worker"},
    "kafkaTls": {"secret": "kafka-ca", "clientCertificate": True},
    "bridge": {"tolerations": [{"key": "a", "operator": "Exists"}], "nodeSelector": {"zone": "a"}},
    "worker": {"antiAffinity": "required", "podAnnotations": {"a": "b"}, "volume": {"storageClass": "fast"}},
    "scorer": {
        "tls": {"secret": "scorer-tls", "clientCertificates": True},
        "tokensSecret": "tokens",
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "extraEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    },
    "networkPolicy": {
        "scorerClients": [{"podSelector": {"matchLabels": {"app": "router"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "egress": {"enabled": True, "extra": [{"ports": [{"protocol": "TCP", "port": 443}]}]},
    },
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "topics": {"strimzi": {"enabled": True, "namespace": "kafka"}},
}
LEAST: Final[dict[str, Any]] = {
    "worker": {"antiAffinity": "none", "volume": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "scorer": {"autoscaling": {"enabled": False}, "replicas": 3},
    "networkPolicy": {"enabled": False},
    "serviceAccount": {"create": False},
}
WATCH: Final[dict[str, Any]] = {
    "engines": {"selector": {"app": "vllm", "llm-d.ai/role": "decode"}, "namespace": "engines", "replayPort": 0},
    "networkPolicy": {"egress": {"enabled": True}},
}
WATCH_ALL: Final[dict[str, Any]] = {"engines": {"selector": {"app": "vllm"}, "allNamespaces": True}}
GATEWAY: Final[dict[str, Any]] = {
    "settings": {"picker": {"max_requests": 64}},
    "kafkaAuth": {},
    "picker": {
        "enabled": True,
        "tls": {"secret": "picker-tls"},
        "pool": {"name": "llama", "create": True, "selector": {"app": "vllm"}, "targetPorts": [8000, 8001]},
        "route": {"enabled": True, "gateway": "inference", "hostnames": ["llm.example"]},
    },
    "networkPolicy": {"egress": {"enabled": True}, "gateways": [{"podSelector": {"matchLabels": {"app": "gateway"}}}]},
    "monitoring": {"serviceMonitor": {"enabled": True}},
}
ENVOY: Final[dict[str, Any]] = {
    "settings": {"picker": {"dns": ["engines.serving:8000"]}},
    "picker": {"enabled": True, "envoy": {"enabled": True, "serviceType": "LoadBalancer"}},
    "networkPolicy": {"gateways": [{"podSelector": {"matchLabels": {"app": "gateway"}}}]},
}
VALUES: Final = {
    "defaults": {},
    "everything": EVERYTHING,
    "least": LEAST,
    "watch": WATCH,
    "watch-all": WATCH_ALL,
    "gateway": GATEWAY,
    "envoy": ENVOY,
}

_TEXTS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
_META: Final = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
    },
}


def _custom(version: str, spec: dict[str, Any], *required: str) -> dict[str, Any]:
    strict = {"type": "object", "additionalProperties": False, "required": list(required), "properties": spec}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"enum": version.split()},
            "kind": {"type": "string"},
            "metadata": _META,
            "spec": strict,
        },
    }


#: What the operators' CRDs say of the fields that the chart uses; anything else is refused.
CUSTOM: Final = {
    "KafkaTopic": _custom(
        "kafka.strimzi.io/v1beta2 kafka.strimzi.io/v1",
        {
            "topicName": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,249}$"},
            "partitions": {"type": "integer", "minimum": 1},
            "replicas": {"type": "integer", "minimum": 1, "maximum": 32767},
            "config": {"type": "object"},
        },
        "partitions",
        "replicas",
    ),
    "ServiceMonitor": _custom(
        "monitoring.coreos.com/v1",
        {
            "selector": {
                "type": "object",
                "additionalProperties": False,
                "required": ["matchLabels"],
                "properties": {"matchLabels": _TEXTS},
            },
            "namespaceSelector": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "any": {"type": "boolean"},
                    "matchNames": {"type": "array", "items": {"type": "string"}},
                },
            },
            "endpoints": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "port": {"type": "string"},
                        "path": {"type": "string"},
                        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                        "relabelings": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {
                                    "action": {"enum": ["replace", "labeldrop"]},
                                    "targetLabel": {"type": "string"},
                                    "replacement": {"type": "string"},
                                    "regex": {"type": "string"},
                                },
                            },
                        },
                    },
                },
            },
        },
        "selector",
        "endpoints",
    ),
    "InferencePool": _custom(
        "inference.networking.k8s.io/v1",
        {
            "selector": {
                "type": "object",
                "additionalProperties": False,
                "required": ["matchLabels"],
                "properties": {"matchLabels": {**_TEXTS, "minProperties": 1, "maxProperties": 64}},
            },
            "targetPorts": {
                "type": "array",
                "minItems": 1,
                "maxItems": 8,
                "items": {"type": "object", "required": ["number"], "properties": {"number": {"type": "integer"}}},
            },
            "endpointPickerRef": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "port"],
                "properties": {
                    "kind": {"enum": ["Service"]},
                    "name": {"type": "string"},
                    "port": {"type": "object", "required": ["number"]},
                    "failureMode": {"enum": ["FailOpen", "FailClose"]},
                },
            },
        },
        "selector",
        "targetPorts",
    ),
    "HTTPRoute": _custom(
        "gateway.networking.k8s.io/v1",
        {
            "parentRefs": {"type": "array", "minItems": 1},
            "hostnames": {"type": "array", "items": {"type": "string"}},
            "rules": {"type": "array", "minItems": 1},
        },
        "parentRefs",
        "rules",
    ),
    "PrometheusRule": _custom("monitoring.coreos.com/v1", {"groups": {"type": "array", "minItems": 1}}, "groups"),
}

Objects = list[dict[str, Any]]


def render(values: dict[str, Any], name: str = "kva", namespace: str = "serving") -> Objects:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=name, namespace=namespace)
    texts = [text for path, text in sorted(files.items()) if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module", params=list(VALUES))
def objects(request: pytest.FixtureRequest) -> Objects:
    return render(VALUES[request.param])


@pytest.fixture(scope="module")
def everything() -> Objects:
    return render(EVERYTHING)


def of_kind(objects: Objects, *kinds: str) -> Objects:
    return [item for item in objects if item["kind"] in kinds]


def workloads(objects: Objects) -> dict[str, dict[str, Any]]:
    return {
        item["metadata"]["labels"]["app.kubernetes.io/component"]: item
        for item in of_kind(objects, "Deployment", "StatefulSet")
    }


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def selected(objects: Objects, labels: dict[str, str]) -> Objects:
    return [
        item
        for item in of_kind(objects, "Deployment", "StatefulSet")
        if labels.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    ]


@pytest.mark.parametrize("version", KUBERNETES)
def test_schemas(objects: Objects, version: str) -> None:
    """Every object is valid for the oldest and the newest supported Kubernetes, with no unknown field."""
    assert len(objects) >= 10
    for item in objects:
        if item["kind"] in CUSTOM:
            jsonschema.validate(item, CUSTOM[item["kind"]])
        else:
            kubernetes_validate.validate(item, version, strict=True)


def test_unknown_field() -> None:
    """The schema check that the chart passes does refuse a misspelt field."""
    (service, *_) = of_kind(render({}), "Service")
    service["spec"]["slector"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint(values: dict[str, Any]) -> None:
    """Helm's linter finds nothing above a remark."""
    result = helm.lint(CHART, values)
    severe = [
        item for item in result.get("messages", []) if str(item.get("severity", "")).lower() in ("warning", "error")
    ]
    assert not severe
    assert not result.get("errors")


def test_names_are_unique(objects: Objects) -> None:
    """No two objects of one kind share a name."""
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


def test_kinds(everything: Objects) -> None:
    """Bridge and scorers are Deployments, workers a StatefulSet, with what each needs beside it."""
    parts = workloads(everything)
    assert {part: item["kind"] for part, item in parts.items()} == {
        "bridge": "Deployment",
        "worker": "StatefulSet",
        "scorer": "Deployment",
    }
    (claim,) = parts["worker"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    rules = pod_of(parts["worker"])["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert selected(everything, rules[0]["labelSelector"]["matchLabels"]) == [parts["worker"]]
    (scaler,) = of_kind(everything, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == parts["scorer"]["metadata"]["name"]
    assert "replicas" not in parts["scorer"]["spec"], "a fixed count would undo the autoscaler at every upgrade"
    assert len(of_kind(everything, "PodDisruptionBudget")) == len(PARTS)
    headless = next(
        s for s in of_kind(everything, "Service") if s["metadata"]["name"] == parts["worker"]["spec"]["serviceName"]
    )
    assert headless["spec"]["clusterIP"] == "None"


def test_selectors(everything: Objects) -> None:
    """Every selector picks the pods of exactly one part, and every named port is one of theirs."""
    for item in of_kind(everything, "Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
        spec = item["spec"]
        chooser = spec.get("podSelector") or spec["selector"]
        if item["metadata"]["name"].endswith("-engines"):
            assert chooser == {"app": "vllm"}
            continue
        (target,) = selected(everything, chooser.get("matchLabels", chooser))
        named = {port["name"] for container in pod_of(target)["containers"] for port in container["ports"]}
        used = {port.get("targetPort") for port in spec.get("ports", [])} if item["kind"] == "Service" else set()
        used |= {port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]}
        assert used - {None} <= named
    for monitor in of_kind(everything, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [s for s in of_kind(everything, "Service") if labels.items() <= s["metadata"]["labels"].items()]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_pods_are_confined(objects: Objects) -> None:
    """No pod runs as root, writes to its image or gets variables of Services; only what watches has a token."""
    for part, item in workloads(objects).items():
        pod = pod_of(item)
        assert pod["enableServiceLinks"] is False
        roles = [role["metadata"]["name"] for role in of_kind(objects, "Role", "ClusterRole")]
        watches = any(role.endswith(f"-{part}") for role in roles)
        assert pod["automountServiceAccountToken"] is watches
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]["cpu"]
            assert container["resources"]["limits"]["memory"]


def test_mounts_have_volumes(objects: Objects) -> None:
    """Every mount names a volume of its pod and every volume is mounted."""
    for item in workloads(objects).values():
        pod = pod_of(item)
        there = {volume["name"] for volume in pod["volumes"]}
        there |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == there


def sections_of(objects: Objects, part: str, folder: Path) -> dict[str, Any]:
    """Load a part's settings as its process does: its arguments, its environment and its mounted file."""
    (container,) = pod_of(workloads(objects)[part])["containers"]
    (volume,) = [v for v in pod_of(workloads(objects)[part])["volumes"] if v["name"] == "settings"]
    (settings,) = [
        item for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == volume["configMap"]["name"]
    ]
    file = folder / "kvatlas.toml"
    file.write_text(settings["data"]["kvatlas.toml"], encoding="utf-8")
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "settings"]
    command, *arguments = container["args"]
    assert f"{mount['mountPath']}/kvatlas.toml" in arguments
    arguments = [str(file) if word.startswith(mount["mountPath"]) else word for word in arguments]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"kvatlas.deploy.commands.{command}").add_arguments(parser)
    environ = {entry["name"]: entry.get("value", "from-elsewhere") for entry in container.get("env", [])}
    return common.load_sections(parser.parse_args(arguments), environ=environ)


@pytest.mark.parametrize("part", PARTS)
def test_settings_load(objects: Objects, part: str, tmp_path: Path) -> None:
    """Arguments, environment and settings file of every part are ones that its command takes."""
    sections = sections_of(objects, part, tmp_path)
    assert sections["kafka"].partitions == 32
    (container,) = pod_of(workloads(objects)[part])["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    listens = {
        int(getattr(sections[part], name).rpartition(":")[2])
        for name in ("listen", "telemetry_listen", "http_listen")
        if getattr(sections[part], name, "")
    }
    assert listens == ports


def test_values_arrive(everything: Objects, tmp_path: Path) -> None:
    """What the values say reaches the settings: large and broken numbers, lists, passwords and certificates."""
    worker = sections_of(everything, "worker", tmp_path)
    assert worker["worker"].cache_bytes == 2147483648
    assert worker["worker"].session_timeout_seconds == 4.5
    assert worker["worker"].strict_gaps is True
    assert worker["worker"].advertise == "$(POD_NAME).kva-kvatlas-worker.serving.svc:50052"
    assert worker["kafka"].ssl_cafile.endswith("/ca.crt")
    scorer = sections_of(everything, "scorer", tmp_path)
    assert scorer["scorer"].models == ["m:strategy=longest-prefix"]
    assert scorer["scorer"].tls_certfile == "/etc/kvatlas/tls/tls.crt"
    users = {
        part: next(e for e in pod_of(item)["containers"][0]["env"] if e["name"] == "KVATLAS_KAFKA_SASL_USERNAME")
        for part, item in workloads(everything).items()
    }
    secrets = {part: entry["valueFrom"]["secretKeyRef"]["name"] for part, entry in users.items()}
    assert secrets == {"bridge": "kafka-user", "worker": "kafka-worker", "scorer": "kafka-user"}
    for part, item in workloads(everything).items():
        kafka = sections_of(everything, part, tmp_path)["kafka"]
        mounted = {m["mountPath"]: m["name"] for m in pod_of(item)["containers"][0]["volumeMounts"]}
        volume = next(
            v for v in pod_of(item)["volumes"] if v["name"] == mounted[str(Path(kafka.sasl_password_file).parent)]
        )
        assert volume["secret"]["secretName"] == secrets[part]
        assert {str(Path(kafka.ssl_cafile).parent), str(Path(kafka.ssl_keyfile).parent)} <= set(mounted)


def test_service_variables_would_be_refused(tmp_path: Path) -> None:
    """A variable that Kubernetes makes of a Service ends a start, which is why the pods have none of them."""
    parser = argparse.ArgumentParser()
    common.add_sections(parser, "scorer")
    with pytest.raises(SettingsError):
        common.load_sections(parser.parse_args([]), environ={"KVATLAS_SCORER_SERVICE_HOST": "10.0.0.1"})


def test_engines(everything: Objects, tmp_path: Path) -> None:
    """The bridge resolves the headless Service that selects the engines, on the Service's ports."""
    settings = sections_of(everything, "bridge", tmp_path)["bridge"]
    assert settings.dns[0] == "tcp://other:5557"
    first, second = parse_engine(settings.dns[1])
    assert (first.live, first.replay) == (
        "tcp://kva-kvatlas-engines.engines.svc:5557",
        "tcp://kva-kvatlas-engines.engines.svc:5657",
    )
    assert (second.rank, first.store) == (1, "default")
    (service,) = [s for s in of_kind(everything, "Service") if s["metadata"]["name"] == "kva-kvatlas-engines"]
    assert service["metadata"]["namespace"] == "engines"
    assert service["spec"]["clusterIP"] == "None"
    assert [port["port"] for port in service["spec"]["ports"]] == [5557, 5657]


@pytest.mark.parametrize(
    ("values", "kind", "namespace"), [(WATCH, "Role", "engines"), (WATCH_ALL, "ClusterRole", "")], ids=["one", "all"]
)
def test_pod_discovery(values: dict[str, Any], kind: str, namespace: str, tmp_path: Path) -> None:
    """A bridge that watches pods may list and watch pods where it looks, and neither it nor another may do more."""
    objects = render(values)
    settings = sections_of(objects, "bridge", tmp_path)["bridge"]
    wanted = values["engines"]["selector"]
    assert dict(pair.split("=") for pair in settings.kubernetes_selector.split(",")) == wanted
    assert settings.kubernetes_namespace == namespace
    assert settings.kubernetes_replay_port == values["engines"].get("replayPort", 5558)
    (role,) = of_kind(objects, "Role", "ClusterRole")
    assert (role["kind"], role["metadata"].get("namespace", "")) == (kind, namespace)
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    (binding,) = of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    assert binding["kind"] == f"{kind}Binding"
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (kind, role["metadata"]["name"])
    assert binding["metadata"].get("namespace", "") == namespace
    (subject,) = binding["subjects"]
    accounts = {part: pod_of(item)["serviceAccountName"] for part, item in workloads(objects).items()}
    assert (subject["name"], subject["namespace"]) == (accounts["bridge"], "serving")
    assert accounts["bridge"] not in (accounts["worker"], accounts["scorer"])
    assert set(accounts.values()) == {item["metadata"]["name"] for item in of_kind(objects, "ServiceAccount")}


def test_no_rights_without_need(everything: Objects) -> None:
    """Where engines are found by DNS, or none are named, nobody gets rights on the Kubernetes API."""
    for objects in (everything, render({})):
        assert not of_kind(objects, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


def test_topics(everything: Objects) -> None:
    """The Strimzi topics are those of the topic table, with the same policies and sizes."""
    made = {item["spec"]["topicName"]: item for item in of_kind(everything, "KafkaTopic")}
    table = {f"Prod_{topic.name}": topic for topic in (*TOPICS, *changelog_topics("atlas"))}
    assert set(made) == set(table)
    for name, topic in table.items():
        spec = made[name]["spec"]
        assert (spec["partitions"], spec["replicas"]) == (32, 3)
        assert {key: str(value) for key, value in spec["config"].items()} == topic_config(topic, replication=3)
        assert made[name]["metadata"]["labels"]["strimzi.io/cluster"] == "kafka"


def test_network_policies(everything: Objects) -> None:
    """Only scorers reach the workers' lookup port, and every part may go where its settings point."""
    policies = {
        item["metadata"]["name"].rpartition("-")[2]: item["spec"] for item in of_kind(everything, "NetworkPolicy")
    }
    assert set(policies) == set(PARTS)
    (lookup,) = [rule for rule in policies["worker"]["ingress"] if rule["ports"][0]["port"] == "grpc-lookup"]
    (peer,) = lookup["from"]
    assert selected(everything, peer["podSelector"]["matchLabels"]) == [workloads(everything)["scorer"]]
    reached = {
        part: {port["port"] for rule in spec["egress"] for port in rule["ports"]} for part, spec in policies.items()
    }
    assert reached["bridge"] >= {53, 9092, 5557, 5558}
    assert reached["scorer"] >= {53, 9092, 50052}
    assert 6443 not in reached["bridge"]
    (bridge,) = [p for p in of_kind(render(WATCH), "NetworkPolicy") if p["metadata"]["name"].endswith("-bridge")]
    assert {port["port"] for rule in bridge["spec"]["egress"] for port in rule["ports"]} >= {443, 6443}


@pytest.mark.parametrize(
    "wrong",
    [
        {"settings": {"worker": {"flush_recrods": 3}}},
        {"settings": {"kafka": {"partitions": 0}}},
        {"settings": {"kafka": {"sasl_password": "secret"}}},
        {"settings": {"scorer": {"listen": "0.0.0.0:1"}}},
        {"worker": {"antiAffinity": "always"}},
        {"scorer": {"replica": 3}},
        {"unknown": 1},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    """A misspelt setting, a value out of bounds, a password in the values: refused before anything is rendered."""
    with pytest.raises(helm.HelmError):
        render(wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kafkaAuth": {"secret": "user"}}, "SASL_SSL"),
        ({"engines": {"selector": {"a": "b"}, "options": "dp=2"}}, "annotate"),
        ({"kafkaTls": {"secret": "ca"}, "settings": {"kafka": {"security_protocol": "SASL_PLAINTEXT"}}}, "SSL"),
    ],
)
def test_values_without_effect_are_refused(wrong: dict[str, Any], says: str) -> None:
    """Values that would have no effect are an error that says what to set."""
    with pytest.raises(helm.HelmRenderError, match=says):
        render(wrong)


@pytest.mark.parametrize("name", ["kvatlas", "a" * 53])
def test_release_names(name: str) -> None:
    """Short and long release names give names that Kubernetes takes, Services included."""
    for item in render(EVERYTHING, name=name):
        assert len(item["metadata"]["name"]) <= (63 if item["kind"] in ("Service", "StatefulSet") else 253)


def test_schema_follows_the_settings() -> None:
    """The chart's schema names exactly the settings that the classes have, with their types and bounds."""
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/chart-schema"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    """Chart and package carry the same version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert chart["version"] == chart["appVersion"] == version


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def test_every_value_is_used() -> None:
    """Each value of values.yaml appears in a template, so none is without effect."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    texts = "".join(path.read_text(encoding="utf-8") for path in (CHART / "templates").iterdir())
    unused = [
        ".".join(path)
        for path in leaves(values)
        if path[0] != "settings" and not any(key in texts for key in path[-3:])
    ]
    assert not unused


def test_picker_sees_its_pool_and_workers_answer_it() -> None:
    """The pool's pods become endpoints, with the rights for that alone; the gateway reaches ext_proc and no more."""
    objects = render(GATEWAY)
    text = next(one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"].endswith("-picker"))["data"]
    settings = tomllib.loads(text["kvatlas.toml"])
    assert settings["picker"]["pool"] == "serving/llama"
    assert settings["picker"]["max_requests"] == 64
    assert settings["picker"]["tls_certfile"] == "/etc/kvatlas/tls/tls.crt"
    assert settings["scorer"]["outcome_delay_ms"] == 0
    (role,) = of_kind(objects, "Role")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["inference.networking.k8s.io"], "resources": ["inferencepools"], "verbs": ["get"]},
    ]
    (pool,) = of_kind(objects, "InferencePool")
    service = next(one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "kva-kvatlas-picker")
    assert pool["spec"]["endpointPickerRef"]["name"] == service["metadata"]["name"]
    assert service["spec"]["ports"][0]["appProtocol"] == "http2"
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "NetworkPolicy")}
    allowed = [
        peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for rule in policies["kva-kvatlas-worker"]["ingress"][1:]
        for peer in rule["from"]
    ]
    assert allowed == ["scorer", "picker"]
    ports = [port["port"] for rule in policies["kva-kvatlas-picker"]["ingress"] for port in rule["ports"]]
    assert ports == ["telemetry", "ext-proc"]


def test_envoy_of_the_chart_asks_every_picker(tmp_path: Path) -> None:
    """Without a Gateway API: the real Envoy takes its configuration, and the picker names it one address."""
    objects = render(ENVOY)
    assert not of_kind(objects, "InferencePool", "HTTPRoute", "Role")
    assert sections_of(objects, "picker", tmp_path)["picker"].one_address
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    file = tmp_path / "envoy.yaml"
    file.write_text(maps["kva-kvatlas-envoy"]["envoy.yaml"])
    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", str(file)], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    clusters = {one["name"]: one for one in yaml.safe_load(file.read_text())["static_resources"]["clusters"]}
    endpoint = clusters["picker"]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    asked = endpoint["address"]["socket_address"]
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "Service")}
    each = services[asked["address"]]
    assert each["clusterIP"] == "None"
    assert each["ports"][0]["port"] == asked["port_value"] == 9002
    assert selected(objects, each["selector"]) == [workloads(objects)["picker"]]
    assert selected(objects, services["kva-kvatlas-envoy"]["selector"]) == [workloads(objects)["envoy"]]
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "NetworkPolicy")}
    peers = policies["kva-kvatlas-picker"]["ingress"][1]["from"]
    assert peers[-1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "envoy"


@pytest.mark.parametrize(
    "wrong", [{"enabled": False, "envoy": {"enabled": True}}, {"envoy": {"enabled": True}, "tls": {"secret": "s"}}]
)
def test_envoy_without_a_picker_that_it_can_ask_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"picker\.envoy"):
        render({"picker": {"enabled": True, **wrong}})


@pytest.mark.parametrize("wrong", [{"pool": {"create": True}}, {"route": {"enabled": True}, "pool": {"name": "llama"}}])
def test_half_a_gateway_is_refused(wrong: dict[str, Any]) -> None:
    """A pool without labels would take every pod, and a route needs a gateway and a pool."""
    with pytest.raises(Exception, match=r"picker\."):
        render({"picker": {"enabled": True, **wrong}})

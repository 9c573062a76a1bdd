"""Where the broker's jars come from: a Maven POM, resolved once into a cache folder.

The cache is `<cache>/kafka-<version>/`, filled in a folder beside it and renamed when complete, under a file lock,
so parallel starts neither clash nor see half a folder. A stamp holds the digest of the POM: a changed POM resolves
again, an unchanged one needs neither Maven nor a network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree as ET

from kvatlas.deploy.brokers.errors import BrokerSetupError

MINIMUM_JAVA = 17
"""Kafka 4 brokers are compiled for Java 17."""

CACHE_VARIABLE = "KVATLAS_CACHE_DIR"

_STAMP = ".pom-sha256"
_POM_NAMESPACE = "{http://maven.apache.org/POM/4.0.0}"


@dataclass(frozen=True, slots=True)
class KafkaHome:
    """What is needed to start a broker.

    Attributes:
        java: the `java` program, version 17 or newer.
        jars: folder whose `*.jar` are the class path.
        version: Kafka's version, as in the POM.
        logging_config: log4j2 configuration; expects the system property `kvatlas.log`.
    """

    java: Path
    jars: Path
    version: str
    logging_config: Path

    def command(self, main_class: str, *jvm_options: str) -> list[str]:
        """The start of a command line that runs `main_class` with these jars."""
        return [
            str(self.java),
            *jvm_options,
            f"-Dlog4j2.configurationFile={self.logging_config}",
            "-cp",
            f"{self.jars}/*",
            main_class,
        ]


def resource(name: str) -> Path:
    """Path of a file in deploy/kafka, in a checkout as in an installed wheel."""
    return Path(str(resources.files("kvatlas.deploy").joinpath("kafka", name)))


def kafka_version(pom: Path | None = None) -> str:
    """The Kafka version that the POM asks for.

    Raises:
        BrokerSetupError: the POM is missing or names no version.
    """
    path = pom or resource("pom.xml")
    try:
        root = ET.parse(path).getroot()  # noqa: S314 - a file of ours, not of a stranger
    except (OSError, ET.ParseError) as error:
        raise BrokerSetupError(f"cannot read {path}: {error}; reinstall kvatlas") from error
    version = root.findtext(f"{_POM_NAMESPACE}properties/{_POM_NAMESPACE}kafka.version")
    if not version:
        raise BrokerSetupError(f"{path} has no property kafka.version; reinstall kvatlas")
    return version.strip()


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """`$KVATLAS_CACHE_DIR`, else `kvatlas` in the user's cache folder."""
    if chosen := environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvatlas"


def find_java(environ: Mapping[str, str]) -> Path:
    """The Java program to run brokers with: `$JAVA_HOME/bin/java`, else `java` on the path.

    Raises:
        BrokerSetupError: there is none, or it is older than 17.
    """
    home = environ.get("JAVA_HOME")
    found = shutil.which(str(Path(home) / "bin" / "java")) if home else None
    found = found or shutil.which("java", path=environ.get("PATH"))
    need = f"the real Kafka needs a Java runtime >= {MINIMUM_JAVA} (Debian: apt-get install openjdk-17-jdk-headless)"
    if found is None:
        raise BrokerSetupError(f"no `java` on the path: {need}, or use the embedded broker")
    run = subprocess.run([found, "-version"], capture_output=True, text=True, check=False)  # noqa: S603
    major = parse_java_version(run.stderr + run.stdout)
    if major is None:
        raise BrokerSetupError(f"`{found} -version` says nothing of a version: {need}; it said {run.stderr.strip()!r}")
    if major < MINIMUM_JAVA:
        raise BrokerSetupError(f"{found} is Java {major}: {need}; or set JAVA_HOME to a newer one")
    return Path(found)


def parse_java_version(output: str) -> int | None:
    """Major version from what `java -version` prints; None where it prints none.

    Java 8 and older call themselves 1.8 and so on.
    """
    match = re.search(r'version "(\d+)(?:\.(\d+))?', output)
    if match is None:
        return None
    major = int(match[1])
    return int(match[2] or 0) if major == 1 else major


def find_kafka() -> KafkaHome:
    """Check Java, resolve the jars where the cache lacks them, and say where all of it is.

    Raises:
        BrokerSetupError: Java or Maven is missing, or Maven could not fetch the jars.
    """
    env = os.environ
    java = find_java(env)
    pom = resource("pom.xml")
    version = kafka_version(pom)
    cache = default_cache_dir(env).expanduser().resolve()
    jars = cache / f"kafka-{version}"
    digest = hashlib.sha256(pom.read_bytes()).hexdigest()
    if not _complete(jars, digest):
        maven = shutil.which("mvn", path=env.get("PATH"))
        if maven is None:
            raise BrokerSetupError(
                "no `mvn` on the path: the jars of the real Kafka are resolved by Maven, once "
                f"(Debian: apt-get install maven); they would go to {jars}"
            )
        with _locked(cache / f"kafka-{version}.lock"):
            # Another process may have resolved them while this one waited for the lock.
            if not _complete(jars, digest):
                _resolve(maven, env, pom, jars, digest)
    return KafkaHome(java=java, jars=jars, version=version, logging_config=resource("log4j2.properties"))


def _complete(jars: Path, digest: str) -> bool:
    try:
        return (jars / _STAMP).read_text() == digest
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _resolve(maven: str, environ: Mapping[str, str], pom: Path, jars: Path, digest: str) -> None:
    work = jars.with_name(f"{jars.name}.part-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    command = [
        maven,
        "-q",
        "-B",
        "-f",
        str(pom),
        "dependency:copy-dependencies",
        "-DincludeScope=runtime",
        f"-DoutputDirectory={work}",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environ))  # noqa: S603
        if run.returncode != 0 or not any(work.glob("kafka_*.jar")):
            tail = "\n".join((run.stdout + run.stderr).strip().splitlines()[-20:])
            raise BrokerSetupError(
                f"Maven could not fetch the jars of Kafka (exit code {run.returncode}); "
                f"check the network and Maven's settings, then try again: {' '.join(command)}\n{tail}"
            )
        (work / _STAMP).write_text(digest)
        shutil.rmtree(jars, ignore_errors=True)
        work.rename(jars)
    finally:
        shutil.rmtree(work, ignore_errors=True)

"""TLS keys and SCRAM users of a secured node.

The node's internal listeners (broker to itself, controller) use mutual TLS with the node's own certificate, so
that no plain listener is left open beside the secured one; clients use SASL_SSL with SCRAM (SHA-256 or
SHA-512) and an authorizer that denies what no ACL allows.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvatlas.deploy.brokers.errors import BrokerSetupError

NODE_PRINCIPAL = "User:CN=kvatlas-node"
SCRAM_MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True, slots=True)
class Security:
    """What a secured node is given.

    Attributes:
        users: SCRAM user name -> password, created when the storage is formatted.
        super_users: user names that the authorizer lets do anything; must be among `users`.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    super_users: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, password in self.users.items():
            # StorageTool takes users as [name=...,password=...], with no way to quote.
            if not name or not password or set("[],=; \n") & set(name + password):
                raise ValueError(f"user {name!r}: name and password must be non-empty, without any of '[],=; '")
        if missing := set(self.super_users) - set(self.users):
            raise ValueError(f"super users {sorted(missing)} are not among the users {sorted(self.users)}")

    def format_arguments(self) -> list[str]:
        """Arguments of the storage formatter that create the users."""
        arguments: list[str] = []
        for name, password in self.users.items():
            for mechanism in SCRAM_MECHANISMS:
                arguments += ["--add-scram", f"{mechanism}=[name={name},password={password}]"]
        return arguments


@dataclass(frozen=True, slots=True)
class KeyStore:
    """A node's key and certificate on disk.

    Attributes:
        path: PKCS#12 file, used as key store and as trust store.
        password: of the file and the key in it.
        certificate: the certificate as PEM: what clients trust (`ssl_cafile`).
    """

    path: Path
    password: str
    certificate: Path


def ensure_keystore(java: Path, folder: Path, hosts: tuple[str, ...]) -> KeyStore:
    """Make the node's self-signed certificate, or take the one that is there.

    Args:
        java: the Java program; `keytool` lies beside it.
        folder: where the files go; created with access for the owner alone.
        hosts: names and addresses that the certificate is for.

    Raises:
        BrokerSetupError: `keytool` is missing or failed.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    store, secret, certificate = folder / "node.p12", folder / "password", folder / "ca.pem"
    if not (store.exists() and secret.exists()):
        store.unlink(missing_ok=True)
        _write_private(secret, secrets.token_urlsafe(24))
        names = ",".join(
            f"{'ip' if host.replace('.', '').isdigit() or ':' in host else 'dns'}:{host}" for host in hosts
        )
        _keytool(
            java, store, secret, "-genkeypair", "-alias", "node", "-storetype", "PKCS12", "-keyalg", "EC",
            "-groupname", "secp256r1", "-validity", "3650", "-dname", "CN=kvatlas-node", "-ext", f"san={names}",
            "-ext", "bc:critical=ca:true",
        )  # fmt: skip
        certificate.unlink(missing_ok=True)
    if not certificate.exists():
        pem = _keytool(java, store, secret, "-exportcert", "-rfc", "-alias", "node")
        # A key entry alone is no trust anchor in a PKCS#12 store: the certificate goes in once more as one.
        certificate.write_text(pem)
        _keytool(java, store, secret, "-importcert", "-noprompt", "-alias", "trusted", "-file", str(certificate))
    return KeyStore(path=store, password=secret.read_text(), certificate=certificate)


def security_properties(security: Security, store: KeyStore) -> dict[str, str]:
    """Broker properties for TLS, SCRAM and the authorizer."""
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    supers = [NODE_PRINCIPAL, *(f"User:{name}" for name in security.super_users)]
    return {
        "ssl.keystore.type": "PKCS12",
        "ssl.keystore.location": str(store.path),
        "ssl.keystore.password": store.password,
        "ssl.key.password": store.password,
        "ssl.truststore.type": "PKCS12",
        "ssl.truststore.location": str(store.path),
        "ssl.truststore.password": store.password,
        "listener.name.internal.ssl.client.auth": "required",
        "listener.name.controller.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": ",".join(SCRAM_MECHANISMS),
        **{f"listener.name.client.{mechanism.lower()}.sasl.jaas.config": login for mechanism in SCRAM_MECHANISMS},
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "false",
        "super.users": ";".join(supers),
    }


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _keytool(java: Path, store: Path, secret: Path, *arguments: str) -> str:
    tool = java.resolve().parent / "keytool"
    command = [str(tool), *arguments, "-keystore", str(store), "-storepass:file", str(secret)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise BrokerSetupError(f"cannot run {tool}: {error}; install a full JDK or JRE") from error
    if run.returncode != 0:
        raise BrokerSetupError(f"keytool failed ({run.returncode}): {(run.stdout + run.stderr).strip()}")
    return run.stdout

"""Settings: one frozen object per section, built once at start; flags win over environment, which wins over a file.

A section is a frozen ``msgspec.Struct`` whose fields carry their help and bounds in ``Annotated[..., Meta(...)]``.
The same class makes the command-line flags, the environment names, the TOML keys and the reference page:

    section ``bridge``, field ``buffer_bytes``: ``--buffer-bytes``, ``KVATLAS_BRIDGE_BUFFER_BYTES``, ``[bridge]
    buffer_bytes = ...``

Lists are repeated flags, TOML arrays, or text split at ``;`` in the environment.
"""

from __future__ import annotations

import argparse
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from kvatlas.bridge.errors import SettingsError

ENV_PREFIX: Final = "KVATLAS_"
ENV_FILE: Final = "KVATLAS_CONFIG"

S = TypeVar("S", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every settings section.

    Attributes:
        CONSTANTS: names that were settings and are constants of the code: whoever still sets one is told so.
    """

    CONSTANTS: ClassVar[frozenset[str]] = frozenset()


class KafkaSettings(Section, frozen=True, kw_only=True):
    """How to reach Kafka; the same for every service."""

    brokers: Annotated[str, Meta(description="bootstrap servers, host:port[,host:port]")] = "127.0.0.1:9092"
    topic_prefix: Annotated[str, Meta(description="put before every topic name, to share a cluster")] = ""
    partitions: Annotated[int, Meta(description="partitions of each topic when it is created", ge=1, le=10_000)] = 8
    replication: Annotated[int, Meta(description="replicas of each topic when it is created", ge=1, le=10)] = 1
    create_topics: Annotated[bool, Meta(description="create missing topics at start")] = True
    security_protocol: Annotated[
        typing.Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], Meta(description="Kafka listener protocol")
    ] = "PLAINTEXT"
    sasl_mechanism: Annotated[
        typing.Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Meta(description="with SASL protocols")
    ] = "SCRAM-SHA-512"
    sasl_username: Annotated[str, Meta(description="with SASL protocols")] = ""
    sasl_password: Annotated[str, Meta(description="with SASL protocols; prefer sasl_password_file")] = ""
    sasl_password_file: Annotated[str, Meta(description="file that holds the password")] = ""
    ssl_cafile: Annotated[str, Meta(description="CA certificates (PEM) that sign the brokers' certificates")] = ""
    ssl_certfile: Annotated[str, Meta(description="client certificate (PEM) for mutual TLS")] = ""
    ssl_keyfile: Annotated[str, Meta(description="key of the client certificate (PEM)")] = ""

    def topic(self, name: str) -> str:
        """Return a topic's name in this deployment."""
        return f"{self.topic_prefix}{name}"


class LogSettings(Section, frozen=True, kw_only=True):
    """Logging of every service."""

    level: Annotated[typing.Literal["debug", "info", "warning", "error"], Meta(description="lowest level shown")] = (
        "info"
    )
    format: Annotated[typing.Literal["text", "json"], Meta(description="one line of text or of JSON a message")] = (
        "text"
    )


class Field(NamedTuple):
    """One setting, as flags and documentation need it."""

    name: str
    type: Any
    help: str
    default: Any
    required: bool


def fields_of(section: type[msgspec.Struct]) -> list[Field]:
    """Return the settings of a section with their help and defaults, in order."""
    hints = typing.get_type_hints(section, include_extras=True)
    found = []
    for field in msgspec.structs.fields(section):
        hint = hints[field.name]
        text = ""
        if get_origin(hint) is Annotated:
            base, *metas = get_args(hint)
            text = next((meta.description for meta in metas if isinstance(meta, Meta) and meta.description), "")
        else:
            base = hint
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        found.append(Field(field.name, base, text, default, field.required))
    return found


def env_name(section: str, field: str) -> str:
    """Return the environment variable of a setting."""
    return f"{ENV_PREFIX}{section}_{field}".upper()


def flag_name(field: str, prefix: str = "") -> str:
    """Return the command-line flag of a setting."""
    return "--" + f"{prefix}{field}".replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser,
    name: str,
    section: type[msgspec.Struct],
    prefix: str = "",
    only: Collection[str] | None = None,
) -> None:
    """Add one flag per setting of a section; absent flags stay out of the namespace's section dict.

    Args:
        parser: gets a group of flags.
        name: of the section.
        section: its class.
        prefix: of the flags.
        only: settings that get a flag; None for all.
    """
    group = parser.add_argument_group(f"{name} settings")
    for field in fields_of(section):
        if only is not None and field.name not in only:
            continue
        flag = flag_name(field.name, prefix)
        dest = f"{name}:{field.name}"
        default = "" if field.default in (None, "", [], {}) else f" (default {_shown(field.default)})"
        text = f"{field.help}{default} [{env_name(name, field.name)}]".replace("%", "%%")
        if field.type is bool:
            group.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text
            )
        elif _is_list(field.type):
            group.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action="append", metavar="VALUE", help=text + ", repeatable"
            )
        else:
            choices = _choices(field.type)
            metavar = None if choices else field.name.rsplit("_", 1)[-1].upper()
            group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, choices=choices, metavar=metavar, help=text)
    for constant in sorted(getattr(section, "CONSTANTS", ())):
        flag, dest = flag_name(constant, prefix), f"{name}:{constant}"
        group.add_argument(flag, dest=dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def flags_of(namespace: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the settings of a section that were given as flags."""
    start = f"{name}:"
    return {key[len(start) :]: value for key, value in vars(namespace).items() if key.startswith(start)}


def read_file(path: Path, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read a TOML settings file: section -> settings.

    Raises:
        SettingsError: the file cannot be read, is not TOML, or has a section that no service knows.
    """
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read settings file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error
    for name, value in document.items():
        if name not in known:
            raise SettingsError(f"settings file {path}: unknown section [{name}]; known: {', '.join(sorted(known))}")
        if not isinstance(value, dict):
            raise SettingsError(f"settings file {path}: {name!r} must be a section, [{name}]")
    return document


def load(
    name: str,
    section: type[S],
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    document: Mapping[str, Mapping[str, Any]] | None = None,
    file: str = "",
) -> S:
    """Build one section from its three sources.

    Args:
        name: section name, also the part after the prefix in environment names.
        section: the settings class.
        flags: settings given on the command line.
        environ: the environment; only names of this section are read.
        document: what :func:`read_file` returned.
        file: the name of that file, for errors.

    Raises:
        SettingsError: a key is unknown or a value is bad; names the source, the key and the reason.
    """
    known = {field.name: field for field in fields_of(section)}
    merged: dict[str, Any] = {}
    file = file.replace("{", "{{").replace("}", "}}")
    sources: tuple[tuple[str, dict[str, Any]], ...] = (
        (f"[{name}] {{key}} in the settings file {file}".rstrip(), dict((document or {}).get(name, {}))),
        (f"environment variable {env_name(name, '')}{{KEY}}", _from_environ(name, environ or {})),
        ("flag --{flag}", dict(flags or {})),
    )
    for place, values in sources:
        for key, value in values.items():
            where = place.format(key=key, KEY=key.upper(), flag=key.replace("_", "-"))
            if key in getattr(section, "CONSTANTS", ()):
                raise SettingsError(f"{where} is a constant now and cannot be set: take it out")
            if key not in known:
                raise SettingsError(f"unknown setting: {where}; known: {', '.join(sorted(known))}")
            merged[key] = _checked(where, section, known[key], value)
    for key, field in known.items():
        if field.required and key not in merged:
            raise SettingsError(
                f"missing setting {key!r}: give {flag_name(key)}, {env_name(name, key)} or [{name}] {key}"
            )
    try:
        return section(**merged)
    except ValueError as error:  # a __post_init__ that compares several settings
        raise SettingsError(f"[{name}]: {error}") from error


def _from_environ(name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    start = f"{ENV_PREFIX}{name}_".upper()
    return {key[len(start) :].lower(): value for key, value in environ.items() if key.startswith(start)}


def _checked(where: str, section: type[msgspec.Struct], field: Field, value: Any) -> Any:
    if _is_list(field.type) and isinstance(value, str):
        value = [part.strip() for part in value.split(";") if part.strip()]
    if field.type is bool and isinstance(value, str):
        value = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower(), value.lower())
    if not isinstance(value, str) and field.type is str:
        raise SettingsError(f"{where}: {value!r} is not text")
    hint = typing.get_type_hints(section, include_extras=True)[field.name]
    try:
        return msgspec.convert(value, type=hint, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {value!r}: {error}") from error


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple)


def _choices(hint: Any) -> list[str] | None:
    if get_origin(hint) is typing.Literal:
        return [str(value) for value in get_args(hint)]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _choices(part))), None)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ";".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)

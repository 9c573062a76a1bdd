"""Rules of the rooms: which sub-package may import which, what is pure, who may use a library, what is private.

A rule that does not hold everywhere names its exceptions here; a test fails where an exception is no longer needed,
so the lists only shrink.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
#: The packages that others build on; `deploy` puts them together.
LIBRARIES: Final = ("bridge", "streams", "scorer", "connector")

#: R2: each room imports only rooms to its left; a set holds siblings that do not know each other.
ORDER: Final[dict[str, tuple[str | frozenset[str], ...]]] = {
    "bridge": ("errors", "model", "runtime", "kafka", "options", "engines", "ingest", "relay"),
    "streams": (
        "v1", "errors", "options", "metrics", "index", "resolve", "state", "tasks", "faust_app", "mirror", "serving",
        "upkeep", "startup", "service",
    ),
    "scorer": (
        "v1", "errors", "options", "scoring", "picker", "tokenization", "lookups", "client",
        frozenset({"api", "library"}), "service", "gateway",
    ),
    "connector": ("errors", "outcome", "metrics", "files", "objects", "offload", "vllm"),
}  # fmt: skip
#: Modules that only carry a name users have outside.
PUBLIC: Final = {"bridge.engine_publisher", "connector.vllm_spec", "connector.vllm_tier", "scorer.__init__"}

#: R3: rooms and modules without I/O, clocks and threads, and what they must not import, directly or through others.
PURE: Final = (
    "bridge.model", "bridge.ingest.tracker", "bridge.ingest.claims", "streams.index", "streams.resolve",
    "scorer.scoring", "scorer.picker", "connector.files.layout", "connector.files.catalog", "connector.outcome",
)  # fmt: skip
IMPURE_LIBRARIES: Final = frozenset(
    {
        *("threading", "socket", "os", "time", "asyncio"),
        *("zmq", "aiokafka", "faust", "mode", "grpc", "google", "rocksdict", "redis", "aiohttp", "prometheus_client"),
    }
)

#: R4: library -> the rooms or modules that may import it.
ONLY: Final[dict[str, tuple[str, ...]]] = {
    "faust": ("streams.faust_app",),
    "mode": ("streams.faust_app",),
    "rocksdict": ("streams.state",),
    "redis": ("streams.mirror", "scorer.library.backends"),
    "zmq": ("bridge.engines", "bridge.ingest.inbound"),
    "aiokafka": ("bridge.kafka", "bridge.relay", "streams.state", "streams.tasks", "streams.faust_app"),
    "hpack": ("scorer.api.http2",),
    "grpc": (
        "bridge.runtime.rpc", "bridge.runtime.methods", "streams.serving", "scorer.api", "scorer.lookups.router",
        "scorer.client", "scorer.tokenization", "scorer.service", "scorer.gateway",
    ),
}  # fmt: skip

LINES: Final = 400
INIT_PARAMETERS: Final = 8

# --- exceptions, by name; each list only shrinks -------------------------------------------------------------------

R2_EXCEPTIONS: Final[frozenset[tuple[str, str]]] = frozenset({})
R3_EXCEPTIONS: Final[frozenset[tuple[str, str]]] = frozenset()
R4_EXCEPTIONS: Final[frozenset[tuple[str, str]]] = frozenset()
R5_EXCEPTIONS: Final[frozenset[frozenset[str]]] = frozenset()
R6_EXCEPTIONS: Final[frozenset[str]] = frozenset(
    {
        "bridge.kafka.fetching: _client",
        "bridge.kafka.fetching: _fetcher",
        "bridge.kafka.fetching: _sender",
        "bridge.kafka.fetching: _sync_task",
        "bridge.kafka.producer: _message_accumulator",
        "bridge.kafka.lease: _coordinator",
        "bridge.runtime.rpc: _MethodResolver",
        "bridge.runtime.rpc: _handle_rpc",
        "bridge.runtime.rpc: _schedule_rpc_coro",
    }
)
R7_EXCEPTIONS: Final[frozenset[str]] = frozenset()
R8_LONG: Final[frozenset[str]] = frozenset()
R8_INIT: Final[frozenset[str]] = frozenset()


@functools.cache
def modules() -> Mapping[str, ast.Module]:
    """Return the syntax tree of every module of the library packages, by dotted name without ``kvatlas.``."""
    found = {}
    for top in LIBRARIES:
        for path in sorted((ROOT / top).rglob("*.py")):
            if "_pb2" not in path.name:
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.parse(path.read_text("utf-8"))
    return found


def exists(name: str) -> bool:
    """Return whether a dotted name is a module (generated ones included)."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return what a module imports anywhere in it: our modules without ``kvatlas.``, libraries by their top name."""
    found: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("kvatlas."):
                found.add(name.split(".")[0])
                continue
            ours = name.removeprefix("kvatlas.")
            found.add(ours if exists(ours) else ours.rpartition(".")[0])
    return frozenset(found)


def below(module: str, rooms: tuple[str, ...]) -> bool:
    """Return whether a module is one of the rooms or inside one."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def only_shrinks(found: set[object], exceptions: frozenset[object]) -> None:
    """Fail where something is found that is no exception, or an exception is not needed any more."""
    assert found - exceptions == set(), "not allowed"
    assert exceptions - found == set(), "exceptions that are not needed any more: take them off the list"


def place(top: str, room: str) -> int:
    """Return where a room stands in the order of its package."""
    return next(
        at for at, entry in enumerate(ORDER[top]) if room == entry or (isinstance(entry, frozenset) and room in entry)
    )


@pytest.mark.parametrize("top", LIBRARIES)
def test_r2_rooms_import_rooms_to_their_left(top: str) -> None:
    """The way of the data is the order of the rooms; siblings do not know each other."""
    wrong: set[object] = set()
    for module in modules():
        parts = module.split(".")
        if parts[0] != top or module in PUBLIC or (parts[-1] == "__init__" and len(parts) == 2):
            continue
        for name in imports(module):
            other = name.split(".")
            if other[0] != top or len(other) == 1 or other[1] == parts[1]:
                continue
            if place(top, other[1]) >= place(top, parts[1]):
                wrong.add((module, name))
    only_shrinks(wrong, frozenset(pair for pair in R2_EXCEPTIONS if pair[0].split(".")[0] == top))


def reached(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module of ours, library) for all that an import of a module brings with it."""
    seen, queue = {module}, [module]
    while queue:
        current = queue.pop()
        for name in imports(current):
            if name in modules():
                if name not in seen:
                    seen.add(name)
                    queue.append(name)
            elif f"{name}.__init__" in modules():
                if name not in seen:
                    seen.add(name)
                    queue.append(f"{name}.__init__")
            else:
                yield current, "google" if "_pb2" in name else name.split(".")[0]


def test_r3_pure_rooms_reach_no_io() -> None:
    """Pure code is the same live, in the library and in the tools: no clock, thread, socket, nor through others."""
    wrong: set[object] = set()
    for module in modules():
        if below(module, PURE):
            wrong |= {(module, library) for _, library in reached(module) if library in IMPURE_LIBRARIES}
    only_shrinks(wrong, R3_EXCEPTIONS)


def test_r4_libraries_have_their_rooms() -> None:
    """A library that may change under us is imported in few places."""
    wrong: set[object] = set()
    for module in modules():
        for library, rooms in ONLY.items():
            if library in imports(module) and not below(module, rooms):
                wrong.add((module, library))
    only_shrinks(wrong, R4_EXCEPTIONS)


def test_r5_no_import_circles() -> None:
    """No module imports itself through others, type-checking imports included."""
    graph = {module: {name for name in imports(module) if name in modules()} for module in modules()}
    circles = {frozenset(circle) for circle in components(graph) if len(circle) > 1}
    only_shrinks(set(circles), R5_EXCEPTIONS)


def components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of a graph (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = []
            while not circle or circle[-1] != node:
                circle.append(stack.pop())
            found.append(circle)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def own_names(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: attributes it sets on anything, methods, functions, fields."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            if isinstance(node.ctx, ast.Store):
                names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            names |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)  # slots
    return names


#: Private by its underscore and still the interface that is documented.
R6_KNOWN: Final = frozenset({"_replace", "_asdict", "_fields", "_make"})


def test_r6_private_names_stay_in_their_module() -> None:
    """No module reads a private name of another module's objects; what reaches into a library is listed by name."""
    wrong: set[object] = set()
    for module, tree in modules().items():
        own = own_names(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            if node.attr not in own and node.attr not in R6_KNOWN and not below(module, ("streams.faust_app",)):
                wrong.add(f"{module}: {node.attr}")
    only_shrinks(wrong, R6_EXCEPTIONS)


def test_r7_class_names_are_unique() -> None:
    """One name, one meaning: a class is found by its name."""
    where: dict[str, set[str]] = defaultdict(set)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(module)
    only_shrinks({name for name, places in where.items() if len(places) > 1}, R7_EXCEPTIONS)


def test_r8_no_module_is_too_long() -> None:
    """A module can be held in the head."""
    long = {
        module
        for module in modules()
        if len(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8").splitlines()) > LINES
    }
    only_shrinks(set(long), R8_LONG)


def test_r8_constructors_take_few_things() -> None:
    """A constructor with many parameters hides a value that has no name yet."""
    wide: set[object] = set()
    for module, tree in modules().items():
        for kind in ast.walk(tree):
            if isinstance(kind, ast.ClassDef):
                for node in kind.body:
                    if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                        count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                        if count > INIT_PARAMETERS:
                            wide.add(f"{module}.{kind.name}")
    only_shrinks(wide, R8_INIT)


def test_every_room_says_what_it_is() -> None:
    """The first thing that one reads in a folder is one sentence of what is in it."""
    for top in (*LIBRARIES, "deploy"):
        for init in (ROOT / top).rglob("__init__.py"):
            doc = ast.get_docstring(ast.parse(init.read_text("utf-8")))
            assert doc, f"{init}: no sentence"


def test_the_tests_mirror_the_rooms() -> None:
    """Tests of a room lie in a folder of the same name."""
    for top in LIBRARIES:
        rooms = {path.name for path in (ROOT / top).iterdir() if (path / "__init__.py").exists()}
        folders = {path.name for path in (ROOT / "tests" / top).iterdir() if any(path.glob("*.py"))}
        assert folders <= rooms, f"tests/{top}: folders without a room"


def test_r1_counts_something() -> None:
    """The rules look at the modules that are there."""
    tops = Counter(module.split(".")[0] for module in modules())
    assert set(tops) == set(LIBRARIES)
    assert min(tops.values()) > 10

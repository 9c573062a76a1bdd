"""gRPC services by their description in a proto: callers and servers of its methods without generated code."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass


def stub_of(channel: Any, proto: ModuleType) -> Any:
    """Return what calls the methods of a proto's service, by their names.

    Args:
        channel: of ``grpc`` or ``grpc.aio``.
        proto: the generated module of a proto that describes one service.
    """
    service = _service(proto)
    return SimpleNamespace(
        **{
            method.name: (channel.unary_stream if method.server_streaming else channel.unary_unary)(
                f"/{service.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            for method in service.methods
        }
    )


def add_service(server: Any, proto: ModuleType, servicer: object) -> None:
    """Let the methods of an object answer the calls of those of a proto's service, one message each way.

    Args:
        server: takes registered methods.
        proto: the generated module of a proto that describes one service.
        servicer: has a method by the name of each.
    """
    service = _service(proto)
    handlers = {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
    }
    server.add_registered_method_handlers(service.full_name, handlers)


def _service(proto: ModuleType) -> Any:
    [service] = proto.DESCRIPTOR.services_by_name.values()
    return service

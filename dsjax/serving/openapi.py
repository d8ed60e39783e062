"""What `/openapi.json` says of the routes: their bodies, and every status that they answer with.

What a schema allows is taken, but for what no schema can say: that prompt and output fit into the
context, and what two fields say of each other.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from dsjax.serving.bodies import Body, ChatBody, CompletionBody
from dsjax.serving.protocol import Served

_REASONS = {
    400: "The request is wrong.",
    401: "A key is missing or unknown.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not application/json, or is compressed.",
    421: "The Host header names another server.",
    429: "Too many sequences are open; Retry-After says when to come again.",
    500: "A fault of the server's.",
    503: "The server warms up or shuts down; Retry-After says when to come again.",
}
_ALWAYS = (401, 421, 500)
_SCHEMAS = "#/components/schemas/"

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def generating(body: type[Body], answer: str, chunk: str) -> dict[str, Any]:
    """A route's arguments when it takes `body` and returns an `answer`, or `chunk`s of one."""
    schema = {"$ref": _SCHEMAS + body.__name__}
    head = "id", "created", "model", "choices"
    event = {"anyOf": [_object(chunk, *head), {"$ref": _SCHEMAS + "Error"}]}
    content = {
        "application/json": {"schema": _object(answer, *head, "usage")},
        "text/event-stream": {"itemSchema": _event(event)},
    }
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        },
        "responses": {200: {"description": "The answer, whole or streamed.", "content": content}}
        | _errors(*_REASONS),
    }


def looking(kind: str, schema: dict[str, Any], *statuses: int, key: bool = True) -> dict[str, Any]:
    """A route's arguments when it only looks and answers with `kind`."""
    extra = {} if key else {"openapi_extra": {"security": []}}
    answer = {"description": "What was asked for.", "content": {kind: {"schema": schema}}}
    return {"responses": {200: answer} | _errors(*_ALWAYS, *statuses), **extra}


def listing() -> dict[str, Any]:
    """The schema of a list of models."""
    schema = _object("list", "data")
    schema["properties"]["data"] = {"type": "array", "items": _model()}
    return schema


def model_of(name: str) -> dict[str, Any]:
    """A route's arguments when it describes the model of this name, which is part of the path."""
    where = {"name": "model_id", "in": "path", "required": True}
    parameter = {**where, "schema": {"type": "string", "const": name}}
    extra = {"openapi_extra": {"parameters": [parameter]}}
    return looking("application/json", _model(), 404) | extra


def describe(app: FastAPI, served: Served) -> None:
    """Make the app's own description of itself complete: the bodies, the error, the key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version="1", openapi_version="3.2.0", routes=app.routes
            )
            schema["components"] = {
                "schemas": {**_bodies(served), "Error": _ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            }
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi


def _bodies(served: Served) -> dict[str, Any]:
    """The schemas of both bodies, and of what they are made of, for the model that is served."""
    kinds = CompletionBody, ChatBody
    _, found = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_SCHEMAS + "{model}"
    )
    schemas = found["$defs"]
    schemas["TokenId"] |= {"minimum": 0, "maximum": served.vocab_size - 1}
    for kind in kinds:
        schemas[kind.__name__]["properties"]["model"] |= {"const": served.name}
    return schemas


def _model() -> dict[str, Any]:
    return _object("model", "id", "created", "owned_by")


def _object(kind: str, *required: str) -> dict[str, Any]:
    """An object that says of itself what it is, and has these fields."""
    return {
        "type": "object",
        "required": ["object", *required],
        "properties": {"object": {"const": kind}},
    }


def _event(schema: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event whose data are JSON of this schema, or the last one."""
    json = {"contentMediaType": "application/json", "contentSchema": schema}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, json]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _errors(*statuses: int) -> dict[int | str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + "Error"}}}
    return {
        status: {"description": _REASONS[status], "content": content} for status in sorted(statuses)
    }

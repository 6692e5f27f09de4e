"""The OpenAPI document, from the models of ``bodies`` and ``answers``."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from zoo import __version__
from zoo.serving import answers, bodies

# path -> (method, summary, body, answer, statuses of errors)
WRONG = (400, 401, 404, 413, 429, 500, 503, 504)
Operation = tuple[str, str, type[BaseModel] | None, type[BaseModel] | None, tuple[int, ...]]
GENERATING: dict[str, Operation] = {
    "/v1/completions": ("post", "Continue prompts", bodies.CompletionBody, answers.CompletionAnswer, WRONG),
    "/v1/chat/completions": ("post", "Answer a chat", bodies.ChatBody, answers.ChatAnswer, WRONG),
}
COMMON: dict[str, Operation] = {
    "/v1/models": ("get", "The model that is served", None, answers.ModelList, (401,)),
    "/tokenize": ("post", "Token ids of a text or a chat", bodies.TokenizeBody, answers.TokenizeAnswer, (400, 401, 404, 413)),
    "/detokenize": ("post", "The text of token ids", bodies.DetokenizeBody, answers.DetokenizeAnswer, (400, 401, 404, 413)),
    "/version": ("get", "The server's version", None, answers.Version, ()),
    "/ready": ("get", "Whether a request would be served now", None, answers.Status, ()),
    "/health": ("get", "Whether the server lives", None, answers.Status, ()),
    "/metrics": ("get", "Prometheus metrics", None, None, ()),
}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    operations = GENERATING | COMMON
    bodies_used = [body for _, _, body, _, _ in operations.values() if body]
    answers_used = [answer for _, _, _, answer, _ in operations.values() if answer] + [answers.ErrorAnswer]
    inputs, schemas = models_json_schema(
        [*((body, "validation") for body in bodies_used), *((answer, "serialization") for answer in answers_used)],
        ref_template="#/components/schemas/{model}",
    )

    def content(model: type[BaseModel], mode: Any) -> dict[str, Any]:
        return {"application/json": {"schema": inputs[model, mode]}}

    paths: dict[str, Any] = {}
    for path, (method, summary, body, answer, wrong) in operations.items():
        good: dict[str, Any] = {"description": "The answer"}
        if answer:
            good["content"] = content(answer, "serialization")
            if path in GENERATING:
                good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        else:
            good["content"] = {"text/plain": {"schema": {"type": "string"}}}
        responses = {"200": good} | {
            str(status): {"description": "An error", "content": content(answers.ErrorAnswer, "serialization")} for status in wrong
        }
        if path in ("/ready", "/health"):
            responses["503"] = {"description": "Not now", "content": content(answers.Status, "serialization")}
        operation: dict[str, Any] = {"summary": summary, "operationId": path.strip("/").replace("/", "_"), "responses": responses}
        if body:
            operation["requestBody"] = {"required": True, "content": content(body, "validation")}
        if 401 in wrong:
            operation["security"] = [{}, {"key": []}]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Engine Zoo", "version": __version__, "description": "An OpenAI-compatible server of one engine."},
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }

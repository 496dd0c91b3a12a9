"""The application: transformers' routes around one model, errors in OpenAI's format, clients that leave."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler

from hymba.chat import NO_SAMPLING, default_stops, released_template
from hymba.config import nearest
from hymba.serving.generation import DEFAULT_NEW_TOKENS, Generation, GenerationFailed, State
from hymba.serving.requests import MAX_BODY_BYTES, Chat, Completion, RequestError, Response, check, error_body

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from hymba.model import HymbaForCausalLM

logger = logging.getLogger("uvicorn.error")

# What transformers' handlers raise on a body that gets past the checks and is no use all the same: a template that
# refuses the conversation, arguments of a call that are not JSON.
_BODY_ERRORS = (ValueError, TypeError, KeyError, AttributeError, jinja2.TemplateError)

# What the server passes to the template itself.
_TEMPLATE_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class OneModel(ModelManager):
    """transformers' model manager with one model in it, loaded before; it loads nothing.

    Args:
        model: answers. tokenizer: its own, with a chat template.
        name: what clients call the model.
    """

    def __init__(self, model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__(model_timeout=-1)
        # Requests may leave the model out.
        self.force_model: str = name
        self.model, self.tokenizer, self._since = model, tokenizer, int(time.time())
        self.stops = default_stops(tokenizer, tokenizer.chat_template)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there are no revisions to choose from."""
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, progress_callback: Any = None, **_: Any
    ) -> tuple[HymbaForCausalLM, PreTrainedTokenizerBase]:
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The list of `/v1/models`; the hub's cache on this machine is nobody's business."""
        return [{"id": self.force_model, "object": "model", "created": self._since, "owned_by": "hymba"}]

    def shutdown(self) -> None:
        """Nothing: the model belongs to the caller (`/reset` asks for this as well)."""


class _Checked(BaseHandler):
    """A handler of transformers' with checks before it. Subclasses name the body's fields."""

    fields: type
    chats = True

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As the handler's, on a body that was checked.

        Raises:
            RequestError: a body that cannot be answered.
        """
        served: OneModel = self.model_manager
        body = check(body, self.fields, served.model.config.vocab_size)
        for variable in body.get("chat_template_kwargs") or ():
            if variable in _TEMPLATE_ARGUMENTS:
                raise RequestError(
                    f"chat_template_kwargs: {variable!r} is not for requests; allowed: variables of the template",
                    param="chat_template_kwargs",
                )
        if "tool_calls" not in served.tokenizer.chat_template:
            for i, message in enumerate(body.get("messages") or ()):
                if "tool_calls" in message:
                    raise RequestError(
                        f"messages[{i}].tool_calls: the model's chat template does not write calls of tools; put what "
                        "the assistant said into content, as it was answered",
                        param=f"messages[{i}].tool_calls",
                    )
        try:
            return await super().handle_request(body, request_id)
        except _BODY_ERRORS as error:
            raise RequestError(f"the request cannot be used: {type(error).__name__}: {error}") from error

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """The request's settings: what the model's file says, and what the request says in its place.

        A temperature above 0 or a `top_p` below 1 switches sampling on, a temperature of 0 off. The seed is set where
        the request generates, not here, where it would be another request's.
        """
        served: OneModel = self.model_manager
        defaults = copy.deepcopy(model_generation_config)
        # What the model's file says is a default; a request's own limit has to fit.
        defaults.max_new_tokens = None
        if body.get("generation_config") is not None:
            defaults = _own_settings(body["generation_config"], defaults)
        asked = defaults.max_new_tokens
        plain = {name: value for name, value in body.items() if name not in ("seed", "generation_config")}
        config = super()._build_generation_config(plain, defaults, use_cb=use_cb)
        if body.get("max_tokens") is None and body.get("max_output_tokens") is None:
            config.max_new_tokens = asked
        if body.get("temperature") or (body.get("top_p") or 1) < 1:
            config.do_sample = body.get("temperature") != 0
        if not config.do_sample:
            for name, value in NO_SAMPLING.items():
                setattr(config, name, value)
        stops = config.stop_strings or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        config.stop_strings = stops + (served.stops if self.chats else [])
        config.cache_implementation = "static" if served.model.device.type == "cuda" else None
        config.sampling_seed = body.get("seed")
        return config


def _own_settings(text: str, defaults: GenerationConfig) -> GenerationConfig:
    """The model's settings with those of a request's `generation_config`, a JSON object in transformers' names."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"generation_config: not JSON: {error}", param="generation_config") from error
    if not isinstance(values, dict):
        raise RequestError("generation_config: allowed: a JSON object", param="generation_config")
    known = [name for name in vars(defaults) if not name.startswith("_")]
    for name, value in values.items():
        if name.startswith("_") or name == "transformers_version":
            continue
        if name not in known:
            raise RequestError(
                f"generation_config: {name!r} is not a generation option.{nearest(name, known)}",
                param="generation_config",
            )
        if value is not None:
            setattr(defaults, name, value)
    return defaults


class ChatHandler(_Checked, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields = Chat


class TextHandler(_Checked, CompletionHandler):
    """`/v1/completions`: a text is continued as it is written."""

    fields, chats = Completion, False


class ResponsesHandler(_Checked, ResponseHandler):
    """`/v1/responses`."""

    fields = Response


class _NoAudio:
    """`/v1/audio/transcriptions`."""

    async def handle_request(self, request: Request) -> Any:
        raise RequestError("this server's model reads and writes text only", status=404)


class Gate:
    """ASGI middleware around the application: the body is read and looked at once, and a client may leave.

    A request whose client has gone is cancelled wherever it waits, so that neither the queue nor the model works for
    nobody. Only streamed responses find that out by themselves.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await _read(receive)
            if body is None:
                return
            if not scope["path"].startswith("/v1/audio") and scope["path"] != "/reset":
                self._look(body)
        except RequestError as error:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        answered = False

        async def replay() -> Message:
            nonlocal body
            if body is not None:
                message: Message = {"type": "http.request", "body": body, "more_body": False}
                body = None
                return message
            return await receive()

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task = asyncio.ensure_future(self.app(scope, replay, watched))
        leaving = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The server ends and has waited long enough for this answer; uvicorn logs a traceback of what is raised.
            task.cancel()
            leaving.cancel()
            return
        if not task.done() and not answered:
            task.cancel()
        leaving.cancel()
        results = await asyncio.gather(task, leaving, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    def _look(self, body: bytes) -> None:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise RequestError(f"the body is a JSON {type(content).__name__}; allowed: an object")
        model = content.get("model")
        if model is not None and not isinstance(model, str):
            raise RequestError(f"model: {json.dumps(model)[:80]}; allowed: the name of a model", param="model")
        if model is not None:
            _check_name(model, self.name)


def _check_name(asked: str, name: str) -> None:
    """Raises RequestError (404) for a model that is not the one served."""
    if asked != name:
        raise RequestError(
            f"model: {asked!r} is not served here; allowed: {name!r} (another one needs a server of its own)",
            status=404,
            param="model",
            code="model_not_found",
        )


async def _read(receive: Receive) -> bytes | None:
    """The whole body; `None` when the client leaves before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body has more than {MAX_BODY_BYTES:,} bytes", status=413)
        if not message.get("more_body", False):
            return body


def build_app(
    model: HymbaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_model_len: int | None = None,
    chat_template: str | None = None,
) -> FastAPI:
    """The ASGI application that serves a model.

    Args:
        model: in evaluation mode, on its device. Nothing may change its weights while it serves.
        tokenizer: gets the released template when it has none.
        name: what clients call the model.
        max_model_len: tokens of prompt and answer together; by default the model's `max_position_embeddings`.
        chat_template: a Jinja template in place of the tokenizer's.
    """
    tokenizer = copy.deepcopy(tokenizer)
    template = chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        # transformers chooses the same way.
        template = template.get("tool_use") or template.get("default")
    tokenizer.chat_template = template or released_template()
    manager = OneModel(model, tokenizer, name)
    usual = max(DEFAULT_NEW_TOKENS, model.generation_config.max_new_tokens or 0)
    state = State(Generation(max_model_len or model.config.max_position_embeddings, usual))
    handlers: dict[str, Any] = {}
    if "systemone_handler" in inspect.signature(build_server).parameters:
        from transformers.cli.serving.systemone import SystemOneHandler

        handlers["systemone_handler"] = SystemOneHandler(manager, state)
    app: FastAPI = build_server(
        manager,
        ChatHandler(manager, state),
        completion_handler=TextHandler(manager, state),
        response_handler=ResponsesHandler(manager, state),
        transcription_handler=_NoAudio(),
        generation_state=state,
        **handlers,
    )
    app.title = "hymba"

    # A name may have a slash in it, as hub ids do.
    @app.get("/v1/models/{model_id:path}")
    def retrieve(model_id: str) -> dict[str, Any]:
        _check_name(model_id, name)
        return manager.get_gen_models()[0]

    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_an_object)
    app.add_exception_handler(GenerationFailed, _generation_failed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Gate, name=name)
    return app


async def _refused(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


async def _http_error(_: Request, error: Any) -> JSONResponse:
    detail = error.detail
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        # As pydantic lists what is wrong.
        where = ".".join(str(part) for part in detail[0].get("loc", ())[1:])
        detail = f"{where}: {detail[0].get('msg')}"
    return JSONResponse(error_body(str(detail), error.status_code), error.status_code)


async def _not_an_object(_: Request, error: Any) -> JSONResponse:
    wrong = error.errors()[0]
    return JSONResponse(error_body(f"{wrong['msg']} (is the Content-Type application/json?)", 400), 400)


async def _generation_failed(_: Request, error: Any) -> JSONResponse:
    logger.error("generation failed", exc_info=error)
    return JSONResponse(error_body(f"generation failed: {error}", 500), 500)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    # uvicorn logs the traceback.
    return JSONResponse(error_body("internal error; the server's log says more", 500), 500)

"""`hymba serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hymba.commands import options as opt
from hymba.commands.errors import UsageError
from hymba.commands.models import load, locate, packed
from hymba.commands.terminal import note, status

_SERVER = "Server"
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
_SHUTDOWN_S = 3
DEFAULT_NAME = "hymba"


class LogLevel(StrEnum):
    """What is written to the terminal; a line for every request from `info` on."""

    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"


def serve(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False)
    ] = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.ModelDType = opt.DType.auto,
    device: opt.Device = "auto",
    quantization: opt.Quantization = None,
    prepack: opt.Prepack = False,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen at; 0.0.0.0 for all.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What requests call the model.",
            show_default=f"the hub id, the folder's name, or {DEFAULT_NAME}",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Most tokens of a prompt and its answer.",
            show_default="the model's max_position_embeddings",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja template. [default: the tokenizer's, else the released one]",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    continuous_batching: Annotated[
        bool,
        typer.Option("--continuous-batching", help="Refused: it cannot carry a Mamba state.", rich_help_panel=_SERVER),
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(metavar="LEVEL", rich_help_panel=_SERVER)] = LogLevel.info,
) -> None:
    """Serve a model to OpenAI clients.

    Chat completions, completions, responses (each streamed or whole) and the list of models under /v1, on
    transformers' own server. Requests are answered one after another, each as it would be alone.
    """
    if continuous_batching:
        from hymba.generation import NO_CONTINUOUS_BATCHING

        raise UsageError(f"--continuous-batching: {NO_CONTINUOUS_BATCHING}; leave it out")
    if checkpoint is not None and model is not None:
        raise UsageError(f"give the model once, as {checkpoint} or as --model {model}")
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}: pip install 'hymba[serve]'")
    template = None if chat_template is None else _read(chat_template)
    listening = _listen(host, port)

    given = model or checkpoint
    path = locate(given)
    with status(f"loading {path}"):
        import uvicorn
        from transformers.utils import logging

        from hymba.serving.app import build_app

        network, tokenizer = load(path, dtype=dtype.value, device=device, revision=revision, quantization=quantization)
    name = served_model_name or _name(given)
    if max_model_len is not None and max_model_len > network.config.max_position_embeddings:
        trained = network.config.max_position_embeddings
        note(f"--max-model-len {max_model_len}: the model's max_position_embeddings is {trained}")
    # It warns of every request; the access log has a line for it as well.
    logging.set_verbosity(logging.DEBUG if log_level is LogLevel.debug else logging.ERROR)
    app = build_app(network, tokenizer, name=name, max_model_len=max_model_len, chat_template=template)
    config = uvicorn.Config(app, log_level=log_level.value, timeout_graceful_shutdown=_SHUTDOWN_S)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {name} at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C ends)", err=True)
    # Ctrl-C is how a server ends.
    with packed(network, prepack), network.frozen_meta_state(), contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _name(given: str | None) -> str:
    """What clients call a model: short, and without this machine's folders."""
    if given is None:
        return DEFAULT_NAME
    folder = Path(given).expanduser()
    return folder.resolve().name if folder.is_dir() else given


def _listen(host: str, port: int) -> socket.socket:
    """The server's socket, before the model is loaded: a port that is taken is found out at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise UsageError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free port") from error
    return listening


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--chat-template {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--chat-template {path}: not UTF-8 text (byte {error.start})") from error

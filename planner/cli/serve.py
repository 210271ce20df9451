"""``planner serve``: a model over HTTP, each request under a budget or a deadline of its own."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli.command_options import (
    Budgets,
    Dtype,
    KernelChoice,
    Place,
    Scheduler,
    check_beside_scheduler,
    command,
    parse_fractions,
)
from planner.cli.console import Console, print_json, say
from planner.planning.request import Request
from planner.progress import Say

_MOST_KEY_BYTES = 1 << 16


@command("model", "switches", "tokens", "utilities")
def serve_command(
    request: Request,
    console: Console,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    budgets: Budgets = "0.5,0.65,0.85,1",
    answers: Annotated[
        int, typer.Option("--batch", min=1, help="Most answers that are generated together.")
    ] = 32,
    waiting: Annotated[
        int, typer.Option("--queue", min=1, help="Most requests that wait; others get 429.")
    ] = 256,
    seconds: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds that a request may take.")
    ] = 120.0,
    most_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Of a prompt with its answer [default: the model's places, 4096 at most].",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = 8,
    remote_images: Annotated[
        bool, typer.Option("--remote-images", help="Fetch images from public addresses.")
    ] = False,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of keys, one a line: others get 401.")
    ] = None,
    grace: Annotated[int, typer.Option(min=0, help="Seconds to finish answers when stopped.")] = 30,
    scheduler: Scheduler = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run replicas on a Ray cluster: its address, auto for the one that runs here, or "
            "local to start one.",
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="How many with --ray: fewest-most, as requests need them [default: 1-4]."
        ),
    ] = None,
    dtype: Dtype = "auto",
    place: Place = "cpu",
    kernels: KernelChoice = "auto",
) -> None:
    """Serve a model by OpenAI's chat completions, each request under its own budget or deadline."""
    from planner.ir.errors import InputError

    try:
        from planner.serving.http_app import http_app
        from planner.serving.http_server import HttpServer
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}: pip install 'planner[serve]'") from None
    from planner.serving.engine import EngineLimits
    from planner.serving.opening import ServiceSettings, load_service

    fractions = parse_fractions(budgets)
    if scheduler is not None:
        check_beside_scheduler(request)
    if ray is None and replicas is not None:
        raise InputError("--replicas are of a Ray cluster: give --ray too")
    keys = [] if api_keys is None else _keys_in(api_keys)
    settings = ServiceSettings(
        request,
        tuple(fractions),
        scheduler,
        dtype,
        place,
        kernels,
        most_tokens,
        images,
        remote_images,
        EngineLimits(answers, waiting, seconds),
    )
    with _listening(host, port) as listener, console.status() as update:
        service: Any
        if ray is None:
            service = load_service(settings, update)
        else:
            service = _replicated(settings, ray, replicas or "1-4", update)
        server = HttpServer(http_app(service, keys), service, grace)
        bound, number = listener.getsockname()[:2]
        name = f"[{bound}]" if ":" in bound else bound
        if not keys and not ipaddress.ip_address(bound).is_loopback and not console.quiet:
            say("planner: everyone who reaches this address can use it: give --api-keys")
        url = f"http://{name}:{number}/v1"
        if console.as_json:
            print_json({"model": request.model, "url": url})
            sys.stdout.flush()
        elif not console.quiet:
            say(f"planner: {request.model} is served on {url}")
        server.run([listener])


def _replicated(settings: Any, address: str, replicas: str, progress: Say) -> Any:
    from planner.ir.errors import InputError

    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", replicas)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if fewest > most:
        raise InputError(f"--replicas is fewest-most, such as 1-4, not '{replicas}'")
    try:
        from planner.serving.replicated_service import open_replicas
    except ModuleNotFoundError as error:
        raise InputError(f"--ray needs {error.name}: pip install 'planner[ray]'") from None
    progress("start replicas")
    return open_replicas(settings, address, (fewest, most))


def _listening(host: str, port: int) -> socket.socket:
    from planner.ir.errors import InputError

    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port}: {reason}") from None
    # Connections have it from the listener; asyncio sets it on sockets that name their protocol
    # alone. Without it an answer waits 40 ms for the client's acknowledgement of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _keys_in(path: Path) -> list[str]:
    from planner.files import read_text
    from planner.ir.errors import InputError

    lines = read_text(path, "file of API keys", _MOST_KEY_BYTES).splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"the file of API keys '{path}' has none: everyone would be let in")
    return keys

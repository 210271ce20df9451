"""The HTTP face of a service: OpenAI's chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from planner.ir.errors import InputError, PlannerError, one_sentence
from planner.serving.chat_format import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Failure,
    FailureBody,
    ServedModel,
    ServedModels,
    place_of,
)
from planner.serving.http_limits import BodyLimit, KeyCheck
from planner.serving.jobs import Busy, Done, Event, Failed, Piece
from planner.serving.service import Asked, ChatService

MOST_BODY_BYTES = 32 * 2**20
# Letters: what a request says may be in its refusal.
_LONGEST_REFUSAL = 320
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": FailureBody} for status in (400, 401, 404, 408, 413, 429, 500, 503)
}
T = TypeVar("T")
# Headers by which llm-d's gateway passes service level objectives on.
Milliseconds = Annotated[float | None, Header(gt=0)]


def http_app(
    service: ChatService[Any], keys: Sequence[str] = (), most_body_bytes: int = MOST_BODY_BYTES
) -> FastAPI:
    """An ASGI application, to be served or mounted in another; the service starts and stops with
    it.

    Any of the API keys opens ``/v1``; without one it is open.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="planner", lifespan=lifespan, responses=_FAILURES)
    app.add_middleware(BodyLimit, most_bytes=most_body_bytes)
    app.add_exception_handler(PlannerError, _planner_failure)
    app.add_exception_handler(StarletteHTTPException, _http_failure)
    app.add_exception_handler(RequestValidationError, _malformed)
    guarded = [Depends(KeyCheck(keys))]

    @app.post(
        "/v1/chat/completions", dependencies=guarded, response_model=ChatCompletion,
        response_model_exclude_none=True,
    )  # fmt: skip
    async def chat(
        body: ChatRequest,
        request: Request,
        x_llm_d_slo_ttft_ms: Milliseconds = None,
        x_llm_d_slo_tpot_ms: Milliseconds = None,
    ) -> Any:
        """Answer a conversation; with `stream`, piece by piece as server-sent events."""
        if body.model != service.name:
            raise HTTPException(404, f"there is no model '{body.model}' here: '{service.name}' is")
        async with AsyncExitStack() as stack:
            asking = service.asked(body, x_llm_d_slo_ttft_ms, x_llm_d_slo_tpot_ms)
            asked = await _while_connected(request, stack.enter_async_context(asking))
            # Until there is something to say, it can still be said that there is nothing.
            first = await _while_connected(request, asked.events.get())
            if isinstance(first, Failed):
                raise first.error
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                chunks = _chunks(service, asked, first, usage, stack.pop_all())
                return StreamingResponse(chunks, media_type="text/event-stream")
            return await _while_connected(request, _whole(service, asked, first))

    @app.get("/v1/models", dependencies=guarded)
    def models() -> ServedModels:
        """The model that is served."""
        return ServedModels(data=[ServedModel(id=service.name, created=service.created)])

    @app.get("/health", response_class=Response)
    def health() -> Response:
        """Status 200 while requests are taken, 503 before and after."""
        return Response(status_code=200 if service.is_healthy else 503)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")

    return app


async def _whole(service: ChatService[Any], asked: Asked, event: Event) -> ChatCompletion:
    """The answer, once it is complete."""
    pieces: list[str] = []
    while isinstance(event, Piece):
        pieces.append(event.text)
        event = await asked.events.get()
    if isinstance(event, Failed):
        raise event.error
    message = AnswerMessage(role="assistant", content="".join(pieces))
    return ChatCompletion(
        id=asked.id,
        created=asked.created,
        model=service.name,
        choices=[Choice(message=message, finish_reason=event.reason)],
        usage=await asyncio.to_thread(service.usage, asked, event),
    )


async def _chunks(
    service: ChatService[Any], asked: Asked, event: Event, with_usage: bool, stack: AsyncExitStack
) -> AsyncIterator[str]:
    """The answer as server-sent events; whoever stops reading ends it."""

    def chunk(**fields: Any) -> str:
        made = ChatChunk(id=asked.id, created=asked.created, model=service.name, **fields)
        return f"data: {made.model_dump_json(exclude_none=True)}\n\n"

    def added(message: AnswerMessage, done: Done | None = None) -> str:
        reason = None if done is None else done.reason
        return chunk(choices=[ChunkChoice(delta=message, finish_reason=reason)])

    async with stack:
        yield added(AnswerMessage(role="assistant", content=""))
        while isinstance(event, Piece):
            if event.text:
                yield added(AnswerMessage(content=event.text))
            event = await asked.events.get()
        if isinstance(event, Failed):
            body = _body(str(event.error), _status(event.error))
            yield f"data: {body.model_dump_json()}\n\n"
            return
        yield added(AnswerMessage(), event)
        if with_usage:
            usage = await asyncio.to_thread(service.usage, asked, event)
            yield chunk(choices=[], usage=usage)
        yield "data: [DONE]\n\n"


async def _while_connected(request: Request, waiting: Awaitable[T]) -> T:
    """What is waited for, unless the client goes away before."""
    wanted = asyncio.ensure_future(waiting)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((wanted, gone), return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            # Nobody reads this; 499 is what nginx notes for it.
            raise HTTPException(499, "the client went away")
        return wanted.result()
    finally:
        for task in (wanted, gone):
            task.cancel()
        await asyncio.gather(wanted, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _status(error: Exception) -> int:
    if isinstance(error, Busy):
        return 429 if error.reason == "queue" else 503
    return 400 if isinstance(error, InputError) else 500


def _body(sentence: str, status: int) -> FailureBody:
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = one_sentence(sentence, _LONGEST_REFUSAL)
    return FailureBody(error=Failure(message=message, type=kind, code=str(status)))


def _failure(sentence: str, status: int, headers: Any = None) -> JSONResponse:
    content = _body(sentence, status).model_dump()
    return JSONResponse(content, status, headers)


async def _planner_failure(_: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else None
    return _failure(str(error), _status(error), headers)


async def _http_failure(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _failure(error.detail, error.status_code, error.headers)


async def _malformed(_: Request, error: Exception) -> Response:
    """What is wrong with a body first: the place, and what pydantic says; never the value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    said = "no such field is served" if first["type"] == "extra_forbidden" else first["msg"]
    return _failure(f"{place_of(first['loc'])}: {said}", 400)

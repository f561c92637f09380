"""The application: routes, keys, limits of bodies, and what every answer goes through."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hybridgen.core import TokenEvent
from hybridgen.errors import HybridgenError, ServerError, shown
from hybridgen.serving.async_client import AsyncClient
from hybridgen.serving.http.chats import ChatJob, encode, template_options, turn
from hybridgen.serving.http.completions import TextJob
from hybridgen.serving.http.errors import ApiError, api_error
from hybridgen.serving.http.fields import Body
from hybridgen.serving.http.jobs import Job, Served
from hybridgen.serving.http.metrics import exposition
from hybridgen.serving.http.responses import ResponseJob
from hybridgen.serving.http.text import chat_messages
from hybridgen.serving.unix.frames import measure

logger = logging.getLogger(__name__)

MOST_BYTES = 8 * 2**20
"""Of a body."""
MOST_VALUES = 2**20
"""Of a body's JSON, those inside others included."""
MOST_DEPTH = 64
PING_SECONDS = 5.0
"""For the generator to say how it is."""
BODY_SECONDS = 30.0
"""For a body to arrive."""


class Door:
    """What the routes share."""

    def __init__(self, served: Callable[[int], Served], client: AsyncClient) -> None:
        """
        Args:
            served: makes the model's description, given its longest context.
        """
        self._make, self.client = served, client
        self._served: Served | None = None
        self.counts: Counter[tuple[str, int]] = Counter()
        """Answers by route and status."""
        self.open_streams = 0

    async def served(self) -> Served:
        """The model; it asks the server how long its context is, which may have been started again with another one.

        Raises:
            ServerError: nobody listens there yet.
        """
        try:
            hello = await self.client.connect()
        except ServerError:
            if self._served is None:
                raise
            return self._served
        before, most = self._served, int(hello["max_context"])
        if before is None or before.max_context != most:
            made = self._make(most)
            self._served = before = made if before is None else replace(made, ignored=before.ignored)
        return before

    async def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/health`: 503 while the model loads, when steps stand still, and when it is gone."""
        try:
            facts = await asyncio.wait_for(self.client.ping(), PING_SECONDS)
        except TimeoutError:
            why = f"the generator has not answered for {PING_SECONDS:g} s"
            return 503, {"status": "unavailable", "reason": why}
        except HybridgenError as error:
            return 503, {"status": "unavailable", "reason": str(error)}
        good = bool(facts["healthy"]) and facts["state"] == "ready"
        return (200 if good else 503), {"status": "ok" if good else "unhealthy", **facts}


def make_app(
    served: Callable[[int], Served],
    client: AsyncClient,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    page: bool = True,
) -> Starlette:
    """The application.

    Args:
        served: makes the model's description, given its longest context.
        client: of the server behind the door.
        keys: one of them is asked for on every path but /health; none: no key is.
        origins: pages of these may call it from a browser (CORS); none: no other page may.
        page: whether `/` shows a page to chat and watch.
    """
    door = Door(served, client)

    def route(path: str, method: str, handle: Callable[[Door, Request], Awaitable[Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                answer = await handle(door, request)
            except Exception as error:
                if not isinstance(error, (ApiError, HybridgenError)):
                    logger.exception("%s failed", path)
                found = api_error(error)
                answer = JSONResponse(found.body, found.status, found.headers)
            door.counts[path, answer.status_code] += 1
            return answer

        return Route(path, endpoint, methods=[method])

    routes = [
        route("/health", "GET", _health),
        route("/metrics", "GET", _metrics),
        route("/v1/models", "GET", _models),
        route("/v1/models/{name:path}", "GET", _model),
        route("/v1/completions", "POST", _generates(TextJob)),
        route("/v1/chat/completions", "POST", _generates(ChatJob)),
        route("/v1/responses", "POST", _generates(ResponseJob)),
        route("/tokenize", "POST", _tokenize),
        route("/detokenize", "POST", _detokenize),
        route("/tokenizer_info", "GET", _tokenizer_info),
        *([route("/", "GET", _page)] if page else []),
    ]
    middleware = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
    middleware = (middleware if origins else []) + ([Middleware(Keys, keys=keys)] if keys else [])

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.close()

    def not_found(request: Request, _: Exception) -> Response:
        error = ApiError(f"there is no {request.method} {request.url.path[:200]} here", status=404, code="not_found")
        return JSONResponse(error.body, 404)

    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={404: not_found, 405: not_found},
    )


class Keys:
    """Asks for a key on every path but /health: as a bearer token, or as the password that a browser asks for."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._good(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )
        wanted = 'Basic realm="hybridgen"' if scope["path"] == "/" else "Bearer"
        await JSONResponse(error.body, 401, {"www-authenticate": wanted})(scope, receive, send)

    def _good(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, value = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = b64decode(value.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        # All of them are compared, so that the time does not tell which one was near.
        found = [hmac.compare_digest(value.strip(), key) for key in self._keys]
        return any(found)


async def body_of(request: Request) -> Body:
    """The JSON object that was sent, read with limits of bytes, values, levels and time.

    Raises:
        ApiError: it is none, or over a limit.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MOST_BYTES:
                    raise ApiError(f"the body has over {MOST_BYTES} bytes; send less at once", status=413)
    except ClientDisconnect:
        raise ApiError("the client went away", status=499) from None
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {BODY_SECONDS:g} s", status=408) from None
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            f"the body is compressed ({shown(request.headers['content-encoding'])}); send it as it is", status=415
        )
    raw = bytes(data)
    shape = measure(raw, MOST_DEPTH)
    if shape.elements > MOST_VALUES or shape.too_deep:
        raise ApiError(f"the body has over {MOST_VALUES} values or {MOST_DEPTH} levels; send less at once", status=413)
    try:
        return Body(json.loads(raw.decode("utf-8"), parse_constant=_no_number))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not UTF-8 JSON: {error}") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _generates(kind: type[Job]) -> Callable[[Door, Request], Awaitable[Response]]:
    """The route of a kind of job."""

    async def handle(door: Door, request: Request) -> Response:
        body = await body_of(request)
        served = await door.served()
        brief = kind.brief(body)
        job = kind(served, body) if brief else await asyncio.to_thread(kind, served, body)
        events = door.client.stream(job.prompts, job.sampling)
        if job.stream:
            # Its first token says whether it was taken: an error before it has its own status.
            first = await _unless_gone(request, anext(events))
            return EventStream(door, job, first, events)
        completions = await _unless_gone(request, door.client.generate(job.prompts, job.sampling))
        return JSONResponse(job.result(completions) if brief else await asyncio.to_thread(job.result, completions))

    return handle


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What it brings; it is cancelled when the client goes away.

    Raises:
        ApiError: the client is gone; nobody reads it.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client went away", status=499)
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(BaseException):  # its own error was told, and it may have been cancelled
                await each


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a job. A client that goes away ends its requests."""

    media_type = "text/event-stream"

    def __init__(self, door: Door, job: Job, first: TokenEvent, events: AsyncIterator[TokenEvent]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._door, self._job, self._first, self._events = door, job, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._door.open_streams += 1
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._door.open_streams -= 1
            for task in (sending, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await task

    async def _send(self, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        async with (
            aclosing(self._events) as events,  # type: ignore[type-var]
            aclosing(together(self._first, events)) as joined,
        ):
            try:
                async for name, value in self._job.chunks(joined):
                    await write(_event(name, value))
            except OSError:
                raise
            except Exception as error:
                if not isinstance(error, (ApiError, HybridgenError)):
                    logger.exception("a stream failed")
                await write(_event(None if self._job.ends_with_done else "error", api_error(error).body))
        await write("data: [DONE]\n\n" if self._job.ends_with_done else "", more=False)


def _event(name: str | None, value: dict[str, Any]) -> str:
    """One server-sent event."""
    return ("" if name is None else f"event: {name}\n") + f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def together(first: TokenEvent, rest: AsyncIterator[TokenEvent]) -> AsyncGenerator[TokenEvent, None]:
    """The events, in which tokens that are there at the same time are one: a step that accepted drafts brings several,
    and so does a reader that is slow. Tokens with log-probabilities stay apart."""
    box: list[TokenEvent | BaseException | None] = []
    filled = asyncio.Event()

    async def pump() -> None:
        try:
            async for event in rest:
                box.append(event)
                filled.set()
        except Exception as error:
            box.append(error)
        else:
            box.append(None)
        filled.set()

    pumping = asyncio.ensure_future(pump())
    try:
        yield first
        while True:
            await filled.wait()
            await asyncio.sleep(0)  # what one message of the server brought is there then
            came, box[:] = box[:], []
            filled.clear()
            waiting: list[TokenEvent] = []
            for event in came:
                if waiting and not (isinstance(event, TokenEvent) and _joins(waiting[-1], event)):
                    yield _one(waiting)
                    waiting = []
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    return
                waiting.append(event)
            if waiting:
                yield _one(waiting)
    finally:
        pumping.cancel()
        with suppress(asyncio.CancelledError):
            await pumping


def _one(events: list[TokenEvent]) -> TokenEvent:
    """Events of one completion as its last one, with the text of all."""
    return events[0] if len(events) == 1 else replace(events[-1], text="".join([event.text for event in events]))


def _joins(one: TokenEvent, other: TokenEvent) -> bool:
    same = (one.index, one.choice) == (other.index, other.choice)
    return same and one.completion is None and one.logprob is None and other.logprob is None


async def _health(door: Door, _: Request) -> Response:
    status, body = await door.health()
    return JSONResponse(body, status)


async def _metrics(door: Door, _: Request) -> Response:
    try:
        facts = await asyncio.wait_for(door.client.stats(), PING_SECONDS)
    except (TimeoutError, ServerError):
        facts = {}
    served = await door.served() if facts else None
    ignored = {} if served is None else served.ignored.counts
    text = exposition(facts, door.counts, ignored, door.open_streams)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "hybridgen",
        "max_model_len": served.max_context,
    }


async def _models(door: Door, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(await door.served())]})


async def _model(door: Door, request: Request) -> Response:
    served = await door.served()
    served.check_model(Body({"model": request.path_params["name"]}))
    return JSONResponse(_card(served))


async def _tokenize(door: Door, request: Request) -> Response:
    body, served = await body_of(request), await door.served()
    served.check_model(body)

    if "messages" not in body.values:
        body.require("prompt")

    def ids_of() -> list[int]:
        if "messages" in body.values:
            go_on = body.switch("continue_final_message")
            options = template_options(body, turn(body.switch("add_generation_prompt", not go_on), go_on))
            return encode(served.text, chat_messages(body.items("messages")), body.items("tools"), options)
        return served.text.encode(body.text("prompt"), special=body.switch("add_special_tokens", True))

    ids = await asyncio.to_thread(ids_of)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.max_context}
    if body.switch("return_token_strs"):
        answer["token_strs"] = [served.text.token(each) for each in ids]
    return JSONResponse(answer)


async def _detokenize(door: Door, request: Request) -> Response:
    body, served = await body_of(request), await door.served()
    served.check_model(body)
    body.require("tokens")
    tokens = body.items("tokens")
    size = len(served.text.tokenizer)
    if not all(type(each) is int and 0 <= each < size for each in tokens):
        raise body.wrong("tokens", f"a list of token ids from 0 to {size - 1}")
    return JSONResponse({"prompt": await asyncio.to_thread(served.text.decode, tokens)})


async def _tokenizer_info(door: Door, _: Request) -> Response:
    served = await door.served()
    tokenizer = served.text.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return JSONResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "chat_template": getattr(tokenizer, "chat_template", None),
            "vocab_size": len(tokenizer),
            "model_max_length": served.max_context,
            **{name: getattr(tokenizer, name, None) for name in names},
            **{f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in names},
        }
    )


async def _page(door: Door, _: Request) -> Response:
    text = files("hybridgen.serving.http").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    )
    return HTMLResponse(text, headers={"content-security-policy": policy, "cache-control": "no-cache"})

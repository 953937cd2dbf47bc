"""The live page's server: what it answers, and to whom.

It reads the files of runs below one folder and changes nothing. A run is asked for by its name in
the list of those found, and by no path, so nothing else can be asked for.
"""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from esper.errors import InputError
from esper.nissa._catalogue import Catalogue
from esper.nissa._feed import Feed, Feeds
from esper.nissa._messages import Cursor, seed_history
from esper.nissa._page import live_page
from esper.nissa._prometheus import registry_of
from esper.nissa._run_files import Summary

HEARTBEAT = 5.0
"""Seconds after which a page hears that nothing has changed."""

_BREATH = 0.25
"""Seconds after which a stream looks whether the server is to stop."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(
    catalogue: Catalogue, *, hosts: Sequence[str] = ("*",), stopping: Callable[[], bool]
) -> Starlette:
    """The application.

    Args:
        catalogue: the runs, looked at once.
        hosts: names that the server may be addressed by; a page of elsewhere that has its own
            name lead here is refused.
        stopping: streams end once it is true.
    """
    feeds = Feeds(catalogue)
    page, policy = live_page()

    async def index(request: Request) -> Response:
        headers = _HEADERS | {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    async def runs(request: Request) -> Response:
        await feeds.rescan()
        return _json(_listed(catalogue.summaries))

    async def stream(request: Request) -> Response:
        name = request.query_params.get("run", "")
        if name not in catalogue.paths:
            return _unknown(name)
        return StreamingResponse(
            _events(feeds, name, stopping),
            media_type="text/event-stream",
            headers=_HEADERS | {"X-Accel-Buffering": "no"},
        )

    async def seed(request: Request) -> Response:
        name = request.query_params.get("run", "")
        feed = feeds.find(name)
        try:
            layer, place = (int(request.query_params[key]) for key in ("layer", "seed"))
        except (KeyError, ValueError):
            layer = place = -1
        if min(layer, place) < 0:
            return _refused("layer and seed must be whole numbers from 0", 400)
        if feed is None:
            return _unknown(name)
        async with feed.lock:
            history = feed.run.history
            return _json(seed_history(history.points, layer, place) | {"rows": history.rows})

    async def metrics(request: Request) -> Response:
        await feeds.rescan()
        states = {summary.name: summary.state for summary in catalogue.summaries}
        text = generate_latest(registry_of(catalogue.rows, states))
        return Response(text, media_type=CONTENT_TYPE_LATEST, headers=_HEADERS)

    async def health(request: Request) -> Response:
        return _json({"status": "ok", "runs": len(catalogue.paths)})

    return Starlette(
        routes=[
            Route("/", index),
            Route("/api/runs", runs),
            Route("/api/stream", stream),
            Route("/api/seed", seed),
            Route("/metrics", metrics),
            Route("/healthz", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


async def _events(feeds: Feeds, name: str, stopping: Callable[[], bool]) -> AsyncIterator[str]:
    """What a page is told, for as long as it listens: `runs`, `run` and `trouble`."""
    try:
        async with feeds.following(name) as feed:
            async for text in _of(feeds, feed, stopping):
                yield text
    except (InputError, KeyError) as error:
        yield _event("runs", _listed(feeds.catalogue.summaries))
        what = str(error) if isinstance(error, InputError) else f"the run {name} is gone"
        yield _event("trouble", {"what": what})


async def _of(feeds: Feeds, feed: Feed, stopping: Callable[[], bool]) -> AsyncIterator[str]:
    cursor, listed, silent = Cursor(), None, 0.0
    while not stopping():
        if listed != feeds.catalogue.summaries:
            listed = feeds.catalogue.summaries
            yield _event("runs", _listed(listed))
        rung = await feed.bell.wait(_BREATH) if _knows(feed, cursor) else feed.ready
        if feed.ready and (rung or silent >= HEARTBEAT or not _knows(feed, cursor)):
            silent = 0.0
            yield _event("run", await feed.told(cursor))
        elif not feed.ready:
            await feed.bell.wait(_BREATH)
        else:
            silent += _BREATH
        await feeds.rescan()


def _knows(feed: Feed, cursor: Cursor) -> bool:
    """Whether the page with this cursor has been told all there is."""
    return cursor.version == feed.run.version and cursor.state == feed.state


def _text(content: Any) -> str:
    # All of it ASCII: the name of a folder may hold bytes that are no text.
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _json(content: Any) -> Response:
    return Response(_text(content), media_type="application/json", headers=_HEADERS)


def _event(kind: str, content: Any) -> str:
    return f"event: {kind}\ndata: {_text(content)}\n\n"


def _listed(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    return [asdict(summary) for summary in summaries]


def _refused(what: str, status: int) -> Response:
    return PlainTextResponse(what + "\n", status, headers=_HEADERS)


def _unknown(name: str) -> Response:
    return _refused(f"no run {name!r} here: see /api/runs", 404)

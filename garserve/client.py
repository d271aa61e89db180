"""A thin client of a garserve server, blocking and asynchronous; it needs httpx and nothing of the engine (floor 5)."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from garserve.client_answers import (
    Events,
    RegionText,
    answer_text,
    answered,
    checked,
    delta,
    is_stream,
    region_text,
    region_texts,
    unstreamed,
)
from garserve.client_wire import Requests

if TYPE_CHECKING:
    import httpx


class Client(Requests):
    """Asks a garserve server. Use it with `with`, or close it."""

    def _open(self, **options: Any) -> "httpx.Client":
        import httpx

        return httpx.Client(**options)

    def describe(self, image: Any, regions: Sequence[Any], **options: Any) -> list[RegionText]:
        """Describe each region by itself; `options` are fields of /v1/regions/describe. Raises ServerError."""
        found = self._post("/v1/regions/describe", self._describe(image, regions, options))
        return region_texts(found)

    def stream_describe(self, image: Any, regions: Sequence[Any], **options: Any) -> Iterator[RegionText]:
        """Yield each region's text as it is done, in any order. Raises ServerError."""
        for found in self._events("/v1/regions/describe", self._describe(image, regions, {**options, "stream": True})):
            if "delta" not in found:
                yield region_text(found)

    def ask(self, image: Any, regions: Sequence[Any], question: str | None = None, **options: Any) -> str:
        """Answer a question in which `<Prompt0>`, … name the regions; none: describe the one region.

        `options` are fields of /v1/chat/completions, and `system` and `turns` ([role, text] pairs, which call a region
        that was described `<Prompt1>`). Raises ServerError.
        """
        found = self._post("/v1/chat/completions", self._ask(image, regions, question, options))
        return answer_text(found)

    def stream_ask(
        self, image: Any, regions: Sequence[Any], question: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Yield an answer's text piece by piece; leaving early cancels it. Raises ServerError."""
        body = self._ask(image, regions, question, {**options, "stream": True})
        for found in self._events("/v1/chat/completions", body):
            if piece := delta(found):
                yield piece

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with answered():
            response = self._http.post(path, json=body)
        return checked(response, response.content)

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        events = Events()
        with answered(), self._http.stream("POST", path, json=body) as response:
            if not is_stream(response):
                unstreamed(response, response.read())
            for piece in response.iter_bytes():
                yield from events.read(piece)
        events.end()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Requests):
    """The same for asyncio. Use it with `async with`, or close it."""

    def _open(self, **options: Any) -> "httpx.AsyncClient":
        import httpx

        return httpx.AsyncClient(**options)

    async def describe(self, image: Any, regions: Sequence[Any], **options: Any) -> list[RegionText]:
        """See Client.describe."""
        found = await self._post("/v1/regions/describe", self._describe(image, regions, options))
        return region_texts(found)

    async def stream_describe(self, image: Any, regions: Sequence[Any], **options: Any) -> AsyncIterator[RegionText]:
        """See Client.stream_describe."""
        body = self._describe(image, regions, {**options, "stream": True})
        async for found in self._events("/v1/regions/describe", body):
            if "delta" not in found:
                yield region_text(found)

    async def ask(self, image: Any, regions: Sequence[Any], question: str | None = None, **options: Any) -> str:
        """See Client.ask."""
        found = await self._post("/v1/chat/completions", self._ask(image, regions, question, options))
        return answer_text(found)

    async def stream_ask(
        self, image: Any, regions: Sequence[Any], question: str | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """See Client.stream_ask."""
        body = self._ask(image, regions, question, {**options, "stream": True})
        async for found in self._events("/v1/chat/completions", body):
            if piece := delta(found):
                yield piece

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with answered():
            response = await self._http.post(path, json=body)
        return checked(response, response.content)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        events = Events()
        with answered():
            async with self._http.stream("POST", path, json=body) as response:
                if not is_stream(response):
                    unstreamed(response, await response.aread())
                async for piece in response.aiter_bytes():
                    for found in events.read(piece):
                        yield found
        events.end()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

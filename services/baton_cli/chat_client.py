"""A small client of OpenAI's chat API, for `baton chat` and for the first request of `baton up`."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import httpx

from baton.errors import BatonError

Message = dict[str, str]  # {"role": "user", "content": "..."}

CONNECT_TIMEOUT_S = 5.0


class ChatError(BatonError):
    """The server said no, or nothing. One line for the user."""


class ChatClient:
    """Owns one HTTP connection pool; close it, or use it as a context manager. Raises ChatError."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.has_key = api_key is not None
        self.request_id: str | None = None  # of the latest answer, as its server named it
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        models = (await self.get_json("/v1/models")).get("data")
        if not models:
            raise ChatError(f"{self.base_url} serves no model")
        return str(models[0]["id"])

    async def get_json(self, path: str) -> Any:
        try:
            response = await self._http.get(path)
            await self._refuse_errors(response)
            return response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise self._translated(error) from error

    async def is_ready(self) -> bool:
        try:
            return (await self._http.get("/ready")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def stream(
        self, model: str, messages: Sequence[Message], **options: Any
    ) -> AsyncGenerator[str, None]:
        """The answer, piece by piece. `options` go into the request's body: max_tokens, temperature, ..."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                self.request_id = response.headers.get("x-request-id")
                await self._refuse_errors(response)
                async for event in _events(response.aiter_lines()):
                    if event.get("error"):
                        raise ChatError(_error_text(event) or "the server reported an error")
                    for choice in event.get("choices", ()):
                        if text := choice["delta"].get("content"):
                            yield text
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise self._translated(error) from error

    async def _refuse_errors(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        await response.aread()
        try:
            text = _error_text(response.json())
        except ValueError:
            text = None
        raise ChatError(f"{response.status_code} {text or response.reason_phrase}")

    def _translated(self, error: Exception) -> ChatError:
        if isinstance(error, httpx.ConnectError):
            return ChatError(f"cannot reach {self.base_url}: is the server running?")
        if isinstance(error, httpx.TimeoutException):
            return ChatError(f"no answer from {self.base_url} in time")
        if isinstance(error, httpx.HTTPError):
            return ChatError(f"the connection to {self.base_url} broke: {error or type(error).__name__}")
        return ChatError(f"{self.base_url} does not speak the OpenAI API: {error}")


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _error_text(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text).split()) if text else None

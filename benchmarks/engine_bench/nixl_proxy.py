"""The proxy in front of vLLM's prefill and decode server: each request goes to the first with one token to make, then
with what that said about its KV blocks to the second, whose answer is passed on byte by byte. Runs in the peers'
environment, with the aiohttp that vLLM brings.

    python nixl_proxy.py PORT PREFILL_URL DECODE_URL
"""

import sys

import aiohttp
from aiohttp import web

REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@web.middleware
async def not_yet(request: web.Request, handler) -> web.StreamResponse:  # type: ignore[no-untyped-def]
    """The servers behind take minutes to start."""
    try:
        return await handler(request)
    except aiohttp.ClientError as error:
        raise web.HTTPBadGateway(text=str(error)) from None


def main() -> None:
    port, prefill, decode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    app = web.Application(middlewares=[not_yet])

    async def session(app: web.Application):  # type: ignore[no-untyped-def]
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as app["session"]:
            yield

    async def models(request: web.Request) -> web.Response:
        async with app["session"].get(f"{decode}/v1/models") as response:
            return web.Response(body=await response.read(), content_type="application/json")

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        first = {k: v for k, v in body.items() if k != "stream_options"}
        first |= {"max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
        async with app["session"].post(prefill + request.path, json=first) as response:
            response.raise_for_status()
            body["kv_transfer_params"] = (await response.json())["kv_transfer_params"]
        async with app["session"].post(decode + request.path, json=body) as response:
            answer = web.StreamResponse(status=response.status)
            answer.content_type = response.content_type
            await answer.prepare(request)
            async for chunk in response.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer

    app.cleanup_ctx.append(session)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()

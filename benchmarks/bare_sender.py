"""The least that uvicorn can do: send the lines of a file as WebSocket frames, then close."""

import sys
from pathlib import Path
from typing import Any

import uvicorn

FRAMES = Path(sys.argv[1]).read_bytes().split(b"\n")


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    for frame in FRAMES:
        await send({"type": "websocket.send", "bytes": frame})
    await send({"type": "websocket.close", "code": 1000})


class Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print(f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}/", flush=True)


if __name__ == "__main__":
    options = uvicorn.Config(
        app, port=0, log_level="error", lifespan="off", ws="websockets-sansio", ws_per_message_deflate=False
    )
    Server(options).run()

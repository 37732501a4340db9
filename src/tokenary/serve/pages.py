"""The playground's files, as they lie in the package."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

_PLAYGROUND = Path(__file__).with_name("playground")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def add_playground(app: FastAPI) -> frozenset[str]:
    """Serve the playground's files, read once; return their paths."""
    paths = set()

    def add(path: str, content: bytes, kind: str) -> None:
        async def file() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)
        paths.add(path)

    for found in sorted(_PLAYGROUND.iterdir()) if _PLAYGROUND.is_dir() else []:
        if found.suffix in _TYPES:
            add("/" if found.name == "index.html" else f"/{found.name}", found.read_bytes(), _TYPES[found.suffix])
    return frozenset(paths)

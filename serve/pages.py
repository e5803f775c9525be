"""The playground's files: read once, served as they are; they load nothing from anywhere else."""

from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).with_name("playground")
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter()


@cache
def content(name: str) -> bytes:
    """A file's bytes. Raises HTTPException 404 for any other name."""
    if name not in TYPES:
        raise HTTPException(404, "Not Found")
    return (FOLDER / name).read_bytes()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return Response(content("index.html"), media_type=TYPES["index.html"], headers=HEADERS)


@router.get("/playground/{name}", include_in_schema=False)
async def file(name: str) -> Response:
    return Response(content(name), media_type=TYPES.get(name), headers=HEADERS)

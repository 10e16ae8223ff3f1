"""The files of the demo page, and how a browser may use them."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

# Nothing but our own files, no inline script or style, no frame around the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/examples.json": ("examples.json", "application/json"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True)
class Page:
    """One file."""

    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        """Changes with the content."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @property
    def headers(self) -> dict[str, str]:
        """Of an answer with this file."""
        return {
            "content-type": self.media_type,
            "content-security-policy": _POLICY,
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "permissions-policy": "camera=(), geolocation=(), microphone=()",
            "cache-control": "no-cache",
            "etag": self.etag,
        }


def read_pages() -> dict[str, Page]:
    """All files of the page, by path."""
    folder = files("batchclf.serve") / "page"
    return {
        path: Page((folder / name).read_bytes(), media_type)
        for path, (name, media_type) in _FILES.items()
    }

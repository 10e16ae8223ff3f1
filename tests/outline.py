"""The outline of an HTML page."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Outline(HTMLParser):
    """Tags with their attributes; fails on one that is closed out of turn.

    A place where a word may be broken is no tag here, and leaves the text whole.
    """

    def __init__(self, page: bytes | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self._within_word = False
        self.feed(page if isinstance(page, str) else page.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within_word = tag == "wbr"
        if self._within_word:
            return
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._within_word = False

    def handle_data(self, data: str) -> None:
        if self._within_word:
            self.texts[-1] += data
        else:
            self.texts.append(data)
        self._within_word = False

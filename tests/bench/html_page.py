"""A report as a browser reads it."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
    """Elements of a page, and the text outside scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if not self._script:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

"""Prompts are data: their Markdown becomes HTML in which nothing of theirs is markup."""

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

# Tables and code as people write them; HTML stays text, and a picture that is named is not fetched.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable(["image", "html_block"])


def _open_link(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A link opens beside the page and tells nobody where it was followed from."""
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _open_block(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Each block is written from the side that its own text asks for."""
    tokens[index].attrSet("dir", "auto")
    return self.renderToken(tokens, index, options, env)


_MARKDOWN.add_render_rule("link_open", _open_link)
for block in ("paragraph_open", "heading_open", "list_item_open", "td_open", "th_open"):
    _MARKDOWN.add_render_rule(block, _open_block)


def to_html(markdown: str) -> str:
    """Returns Markdown as HTML that is safe to show."""
    return str(_MARKDOWN.render(markdown))

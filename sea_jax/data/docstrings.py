"""Pairs of a post and its human-written one-sentence summary, mined from docstrings of the installed packages.

A docstring opens with one sentence that says what the thing does, and often explains it in prose below: the sentence
is the summary and the prose the post. Sources are parsed, never imported.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from sea_jax.runtime.cache import cache_dir

# Raise it whenever the same sources would give other pairs.
MINER_VERSION = 1

# Distribution -> import name, of what the library needs and what that needs in turn; the absent are passed over.
PACKAGES = {
    "absl-py": "absl",
    "etils": "etils",
    "flax": "flax",
    "gguf": "gguf",
    "grain": "grain",
    "httpx": "httpx",
    "huggingface_hub": "huggingface_hub",
    "jax": "jax",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "ml_collections": "ml_collections",
    "numpy": "numpy",
    "optax": "optax",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "requests": "requests",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "tensorboardX": "tensorboardX",
    "tensorflow-datasets": "tensorflow_datasets",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "treescope": "treescope",
}

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "lib2to3"}
SUMMARY_WORDS = (4, 25)
POST_WORDS = (30, 200)
MIN_PROSE_SHARE = 0.8

SECTIONS = (
    "arg|args|argument|arguments|parameter|parameters|param|params|keyword args|keyword arguments|keyword parameters|"
    "other parameters|attribute|attributes|return|returns|yield|yields|raise|raises|warns|receives|methods|example|"
    "examples|usage|example usage|usage example|sample usage|see also|note|notes|warning|warnings|reference|references|"
    "todo|invariants|side effects|copyright|command line|options"
)
SECTION = re.compile(rf"(?i)({SECTIONS})\s*:{{1,2}}\s*$")
FIELD = re.compile(
    r"[:@](param|parameter|arg|argument|key|keyword|type|return|returns|rtype|raise|raises|var|ivar|cvar)\b"
)
UNDERLINE = re.compile(r"([-=~^\"*#+`])\1{2,}\s*$")
NOT_PROSE = re.compile(r"(.*(?:%\(|XXX|TODO)|>>>|\.\. |\||\+[-=]|#|[-*+•] |\(?[0-9a-zA-Z]{1,2}[.)] |={2,}|-{2,}|\$ |@)")
LAST_SENTENCE_OPEN = re.compile(r"(^|(?<=[.!?]) )[^.!?]*(?:[.!?]\S[^.!?]*)*:+$")
PROSE_WORD = re.compile(r"[(\"'“]*[A-Za-z]+(?:['\u2019/-][A-Za-z]+)*[)\"'”]*[.,;:!?]*[)\"'”]*")
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!vs)(?<!etc)[.!?]['\")]?\s+[A-Z]")
PARAGRAPH = re.compile(r"[\"'“(]?[A-Z].*[.!?][)\"'”]*")
SIGNATURE = re.compile(r"[\w.]+\(|.*->")

# Markup of reStructuredText and Markdown -> the words a reader sees.
MARKUP = (
    (re.compile(r"\s*\[[\w#*-]+\]_"), ""),
    (re.compile(r"\[`?~?([^\]\[`]+)`?\]\([^)\s]*\)"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^`>]+>`_{0,2}"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:|\[)?(?<!`)`~(?:[^`]*\.)?([^`.]+)`(?!`)\]?"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:|\[)?(?<!`)`[.!]?([^`]+)`(?!`)_{0,2}\]?"), r"\1"),
    (re.compile(r"(`{2,3})([^`]+)\1"), r"\2"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\w(?:[^*]*\w)?)\*(?!\w)"), r"\1"),
    (re.compile(r"\b([A-Za-z]+)_(?=[\s.,;)]|$)"), r"\1"),
    (re.compile(r"\s+"), " "),
)


class Pair(NamedTuple):
    """A summary and what it summarises; both plain text, the post's paragraphs divided by an empty line."""

    summary: str
    post: str


def mine() -> list[Pair]:
    """Returns the pairs of the standard library and of the listed packages that are installed, in a fixed order, no post twice.

    They are kept in the cache directory under a hash of the versions; the log gives their number and own hash.
    """
    sources = installed()
    versions = [f"{name}=={version}" for name, (version, _) in sources.items()]
    key = hashlib.sha256("\n".join([str(MINER_VERSION), *versions]).encode()).hexdigest()[:16]
    cached = cache_dir() / f"docstrings-{key}.jsonl"
    if cached.is_file():
        pairs = [Pair(**json.loads(line)) for line in cached.read_text(encoding="utf-8").splitlines()]
    else:
        logging.info("reading the docstrings of %s; this is done once", ", ".join(versions))
        pairs = pairs_of_folders([folder for _, folder in sources.values()])
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".docstrings-", dir=cached.parent) as scratch:
            partial = Path(scratch) / cached.name
            partial.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs), encoding="utf-8")
            partial.replace(cached)
    content = hashlib.sha256("\n".join(f"{pair.summary}\n{pair.post}" for pair in pairs).encode()).hexdigest()[:16]
    logging.info("%d docstring pairs, content hash %s", len(pairs), content)
    return pairs


def installed() -> dict[str, tuple[str, Path]]:
    """Returns name -> (version, folder) of the standard library and of the listed packages that are installed."""
    found = {"python": (platform.python_version(), Path(sysconfig.get_paths()["stdlib"]))}
    for distribution, import_name in PACKAGES.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        spec = importlib.util.find_spec(import_name)
        for folder in (spec and spec.submodule_search_locations) or ():
            found[import_name] = (version, Path(folder))
    return found


def pairs_of_folders(folders: Sequence[Path]) -> list[Pair]:
    """Returns the pairs of all Python files at any depth below some folders but tests, in a fixed order, no post twice."""
    by_post: dict[str, Pair] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if file.is_file() and not SKIPPED_FOLDERS & set(file.relative_to(folder).parts):
                for pair in pairs_of_source(file.read_bytes()):
                    by_post.setdefault(pair.post, pair)
    return list(by_post.values())


def pairs_of_source(source: bytes) -> Iterator[Pair]:
    """Yields the pairs of one Python file, in the order of its syntax tree; one that does not parse has none."""
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        # Statements alone, since to walk all expressions too takes longer than to parse them.
        for block in ("finalbody", "orelse", "handlers", "body"):
            nodes.extend(reversed(getattr(node, block, ())))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            pair = pair_of_docstring(docstring) if docstring else None
            if pair is not None:
                yield pair


def pair_of_docstring(docstring: str) -> Pair | None:
    """Returns the summary and the prose of a docstring without its indentation, or None where it has no such pair."""
    first, *rest = re.split(r"\n\s*\n", docstring)
    if first.count("\n") > 2 or SIGNATURE.match(first) or SENTENCE_END.search(first):
        return None
    summary = plain(first)
    if not SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1]:
        return None
    if not re.match(r"[A-Z].*[\w.)!'\"]$", summary) or prose_share(summary) < MIN_PROSE_SHARE:
        return None
    post = ""
    for paragraph in prose(rest):
        longer = f"{post}\n\n{paragraph}".strip()
        if len(longer.split()) > POST_WORDS[1]:
            break
        post = longer
    if len(post.split()) < POST_WORDS[0]:
        return None
    if bare(summary) in bare(post) or "copyright" in post.lower():
        return None
    return Pair(summary, post)


def prose(blocks: list[str]) -> Iterator[str]:
    """Yields the paragraphs of prose before the first section, without code, lists, tables and directives.

    Args:
      blocks: what empty lines divide.
    """
    fenced = False
    for block in blocks:
        lines = block.split("\n")
        if len(re.findall(r"(?m)^\s*(?:```|~~~)", block)) % 2:
            fenced = not fenced
            continue
        if SECTION.match(lines[0]) or FIELD.match(lines[0]) or (len(lines) > 1 and UNDERLINE.match(lines[1])):
            return
        if fenced or "```" in block or any(line.startswith((" ", "\t")) or NOT_PROSE.match(line) for line in lines):
            continue
        # A sentence that ends in a colon leads to what was dropped.
        paragraph = plain(LAST_SENTENCE_OPEN.sub("", " ".join(lines)))
        if PARAGRAPH.fullmatch(paragraph) and prose_share(paragraph) >= MIN_PROSE_SHARE:
            yield paragraph


def plain(text: str) -> str:
    """Returns a paragraph of reStructuredText or Markdown without its markup and line breaks."""
    for pattern, words in MARKUP:
        text = pattern.sub(words, text)
    return text.strip()


def bare(text: str) -> str:
    """Returns the words of a text in lower case, for comparison."""
    return " ".join(re.findall(r"\w+", text.lower()))


def prose_share(text: str) -> float:
    """Returns the share, between 0 and 1, of a text's words (at least one) that are made of letters."""
    words = text.split()
    return sum(PROSE_WORD.fullmatch(word) is not None for word in words) / len(words)

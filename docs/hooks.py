"""What MkDocs and mkdocstrings are told beyond ``mkdocs.yml``."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the changelog, and the pictures of ``benchmarks/`` under the links that work in a clone, too."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for picture in sorted((ROOT / "benchmarks").glob("*.png")):
        name = f"benchmarks/{picture.name}"
        added = File.generated(config, f"../{name}", abs_src_path=str(picture), inclusion=InclusionLevel.INCLUDED)
        added.dest_uri = name
        files.append(added)
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Say of a Japanese page that it is one: a browser goes by that for the shapes of the characters."""
    return output.replace('<html lang="en"', '<html lang="ja"', 1) if page.file.src_uri.startswith("ja/") else output


class Described(griffe.Extension):
    """Docstrings as the site shows them.

    The siblings' are put together when the library is imported, so that reading the source does not find them; and the
    roles of reStructuredText become plain code.
    """

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a public class without a docstring the one that it has at run time."""
        if cls.docstring is None and not cls.name.startswith("_") and cls.parent is cls.module:
            found = inspect.getdoc(getattr(import_module(cls.module.path), cls.name))
            cls.docstring = griffe.Docstring(_plain(found or ""), parent=cls, parser=griffe.Parser.google)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Take the roles out of every docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _plain(obj.docstring.value)


def _plain(text: str) -> str:
    """Turn :class:`~emonavi.Emotion` into `Emotion`, and let one example be set as code, as several are."""
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r":\w+:`(?:~[\w.]*\.)?([\w.]+)`", r"`\1`", text)

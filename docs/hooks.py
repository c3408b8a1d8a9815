"""What MkDocs is told beyond ``mkdocs.yml``: files of the site that lie outside ``docs/``."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the changelog, and the pictures of ``benchmarks/`` under the links that work in a clone, too."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for picture in sorted((ROOT / "benchmarks").glob("*.png")):
        name = f"benchmarks/{picture.name}"
        added = File.generated(config, f"../{name}", abs_src_path=str(picture))
        added.dest_uri = name
        files.append(added)
    return files

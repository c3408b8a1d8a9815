"""``python -m emonavi``: the same as the command ``emonavi``."""

from emonavi.cli import app

if __name__ == "__main__":  # spawned workers import this module again
    app()

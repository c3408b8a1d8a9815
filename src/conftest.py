"""The integrations' doctests, where their packages are installed."""

from importlib.util import find_spec

collect_ignore = [
    f"emonavi/integrations/{name}.py" for name in ("transformers", "lightning") if find_spec(name) is None
]

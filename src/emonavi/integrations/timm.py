"""timm: the siblings by name in ``timm.optim.create_optimizer_v2(model, "emonavi", lr=1e-3)``."""

from __future__ import annotations

from importlib import import_module

from emonavi.integrations import missing
from emonavi.registry import SIBLINGS

__all__ = ["register"]


def register() -> list[str]:
    """Add the siblings to timm's registry and return their names; a second call changes nothing.

    timm gets import strings, and by its habit hands on ``weight_decay=0.0`` where none is given.

    Raises:
        ImportError: timm is not installed, or has no registry (before 1.0.12).
    """
    try:
        OptimInfo = import_module("timm.optim").OptimInfo
        registry = import_module("timm.optim._optim_factory").default_registry  # nowhere public
    except (ImportError, AttributeError) as error:
        raise missing(__name__, "timm>=1.0.12") from error
    for sibling in SIBLINGS.values():
        if sibling.name not in registry.list_optimizers():
            path = f"emonavi.{sibling.cls.__name__}"
            registry.register(
                OptimInfo(name=sibling.name, opt_class=path, description=sibling.description, has_betas=True)
            )
    return list(SIBLINGS)

"""The engine: stage by stage and block by block, a step is asked for its changes, and one place commits them."""

from armor_recipes.session.session import Session

__all__ = ["Session"]

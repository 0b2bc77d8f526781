"""The whole job: recipe → plan → preflight → session → checkpoint → evaluation → report → commit."""

from armor_recipes.run.job import Job, apply, execute, follow, prepare
from armor_recipes.run.result import Result

__all__ = ["Job", "Result", "apply", "execute", "follow", "prepare"]

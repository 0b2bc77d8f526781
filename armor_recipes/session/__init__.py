"""The engine: a plan made on shapes alone, then layer by layer calibrate → solve → apply, through forward hooks."""

from armor_recipes.session.events import Event, Observer
from armor_recipes.session.plan import ModulePlan, Plan, make_plan
from armor_recipes.session.session import ModuleResult, Session

__all__ = ["Event", "ModulePlan", "ModuleResult", "Observer", "Plan", "Session", "make_plan"]

"""The engine: a plan made on shapes alone, then layer by layer calibrate → solve → apply, through forward hooks."""

from armor_recipes.session.events import Event, Observer
from armor_recipes.session.plan import ModulePlan, Plan, RefinePlan, make_plan
from armor_recipes.session.rearranging import RearrangeResult
from armor_recipes.session.refining import RefineResult
from armor_recipes.session.session import Session
from armor_recipes.session.solving import FactorChange, ModuleResult

__all__ = [
    "Event",
    "FactorChange",
    "ModulePlan",
    "ModuleResult",
    "Observer",
    "Plan",
    "RearrangeResult",
    "RefinePlan",
    "RefineResult",
    "Session",
    "make_plan",
]

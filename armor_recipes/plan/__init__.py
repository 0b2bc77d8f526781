"""What a run will do, made on shapes alone: a pure value, and beside it an estimate of what that takes on this machine."""

from armor_recipes.plan.building import first_unservable, make_plan
from armor_recipes.plan.estimate import Rates, RunEstimate, estimate_run
from armor_recipes.plan.plan import Plan, Totals

__all__ = ["Plan", "Rates", "RunEstimate", "Totals", "estimate_run", "first_unservable", "make_plan"]

"""Thin adapters to the neighbours, imported when they are needed: see `armor_recipes.integrations.deferred`."""

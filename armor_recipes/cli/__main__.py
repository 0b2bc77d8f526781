"""`python -m armor_recipes.cli`: `armor-apply`, for launchers that start modules."""

from __future__ import annotations

from armor_recipes.cli.apply import main

if __name__ == "__main__":
    main()

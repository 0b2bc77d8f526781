"""What tests of several rooms share: models, sessions, folders, recipes, shells. Fixtures are in `tests/conftest.py`."""

"""The one thing pyproject.toml cannot say: an optional compiled extension (no compiler: the torch path is used instead)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "armor_recipes.solver._native",
            sources=["armor_recipes/solver/native/sweep.c"],
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)

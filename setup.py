"""The one thing pyproject.toml cannot say: optional compiled extensions (no compiler: torch is used instead)."""

from glob import glob

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden"]
KERNEL = "armor_recipes/runtime/native"

setup(
    ext_modules=[
        Extension(
            "armor_recipes.solver._native",
            sources=sorted(glob("armor_recipes/solver/native/*.c")),  # noqa: PTH207 - setuptools wants relative strings
            depends=sorted(glob("armor_recipes/solver/native/*.h")),  # noqa: PTH207
            extra_compile_args=FLAGS,
            optional=True,
        ),
        # No -march: each path names the instructions it needs, and is taken only where the processor has them.
        Extension(
            "armor_recipes.runtime._native",
            sources=sorted(glob(f"{KERNEL}/*.c")),  # noqa: PTH207 - setuptools wants relative strings
            depends=sorted(glob(f"{KERNEL}/*.h")),  # noqa: PTH207
            extra_compile_args=[*FLAGS, "-fno-wrapv"],  # Python's own -fwrapv makes these loops a tenth slower
            optional=True,
        ),
    ]
)

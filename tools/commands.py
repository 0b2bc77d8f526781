"""Runs the commands of a page of the docs that no test runs, for they take hours, a GPU or a download.

`make commands PAGE=docs/results.md`: the shell blocks below `<!-- run by make commands -->`, in order, in this folder. The first
that fails ends it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

_BLOCK = re.compile(r"^ *<!-- run by make commands -->\n *```bash\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def run(page: Path) -> int:
    """Run the blocks of a page; the exit code of the first that fails, or 0."""
    blocks = [textwrap.dedent(match["text"]) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]
    if not blocks:
        sys.exit(f"{page} has no commands that `make commands` runs")
    for block in blocks:
        print(block, end="", flush=True)
        if code := subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one page: make commands PAGE=docs/results.md")
    sys.exit(run(Path(sys.argv[1])))

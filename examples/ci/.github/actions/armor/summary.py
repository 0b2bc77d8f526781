"""What a run came to, as a Markdown table: python summary.py OUTPUT >> "$GITHUB_STEP_SUMMARY"."""

from __future__ import annotations

import json
import sys
from pathlib import Path

output = Path(sys.argv[1])
if not (output / "report.json").is_file():
    print(f"No output in `{output.name}`: the log says why.")
    sys.exit()
report = json.loads((output / "report.json").read_text(encoding="utf-8"))
manifest = json.loads((output / "armor_manifest.json").read_text(encoding="utf-8"))
totals, before, after = manifest["totals"], manifest["evaluation"]["before"], manifest["evaluation"]["after"]
rows = [
    ("size on disk", f"{report['size_before_bytes'] / 1e6:.2f} MB", f"{report['size_after_bytes'] / 1e6:.2f} MB"),
    (f"{totals['modules']} modules", f"{totals['bytes_before'] / 1e6:.2f} MB", f"{totals['bytes_after'] / 1e6:.2f} MB"),
]
if after:
    rows.insert(0, ("perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}"))
print(f"| {manifest['model']['id']} | before | after |\n|---|---:|---:|")
for row in rows:
    print(f"| {' | '.join(row)} |")
machine = f"{manifest['machine']['architecture']} {manifest['machine']['vendor']} {manifest['machine']['level']}"
print(f"\n{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 1e6:.0f} MB, on {machine}; ", end="")
print(f"recipe `{manifest['recipe_sha256'][:12]}`, {len(manifest['tensors'])} tensors.")

"""Score a trained network, or anybody's features or distances, by the field's protocols.

python tools/evaluate.py RUN [--checkpoint best] [--set data.root=PATH]
python tools/evaluate.py --arrays scores.npz --rule sysu
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch.nn import functional as F

from engine import checkpoint, report
from engine.errors import UserError, run_tool
from engine.evaluate import Score, evaluate_checkpoint, score, summary

COLUMNS = "query_ids, gallery_ids, query_cams, gallery_cams (int [Q], [G], [Q], [G])"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", metavar="RUN", help="run folder, or a checkpoint file")
    what.add_argument(
        "--arrays",
        metavar="NPZ",
        help=f"distance [Q, G], or query_features [Q, D] and gallery_features [G, D]; with {COLUMNS}",
    )
    parser.add_argument("--checkpoint", default="last", metavar="NAME", help="last (default), best, stage1, ...")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    parser.add_argument("--rule", choices=("plain", "sysu", "llcm"), default="plain", help="filter, for --arrays")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON too")
    arguments = parser.parse_args()
    if arguments.arrays:
        rows = [("arrays", _score_arrays(Path(arguments.arrays), arguments.rule))]
    else:
        path = checkpoint.locate(arguments.run, arguments.checkpoint)
        scores = evaluate_checkpoint(path, arguments.set)
        name = "best (chosen on test scores)" if path.stem == "best" else path.stem
        rows = [(f"{name} + {row.rerank}" if row.rerank else name, row) for row in scores]
    print(report.table(rows))
    if arguments.json:
        content = json.dumps([{"row": label} | asdict(row) for label, row in rows], indent=2)
        checkpoint.write(Path(arguments.json), content.encode())
    return 0


def _score_arrays(path: Path, rule: str) -> Score:
    if not path.is_file():
        raise UserError(f"--arrays {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"--arrays {path}: not an .npz file of plain arrays ({error})") from error
    if "distance" not in arrays:
        missing = {"query_features", "gallery_features"} - arrays.keys()
        if missing:
            raise UserError(
                f"--arrays {path}: needs 'distance', or {' and '.join(sorted(missing))}; has {list(arrays)}"
            )
        features = (F.normalize(arrays[name].float()) for name in ("query_features", "gallery_features"))
        query, gallery = features
        arrays["distance"] = 1 - query @ gallery.T
    names = ["query_ids", "gallery_ids", "query_cams", "gallery_cams"]
    if rule == "plain":
        arrays = {"query_cams": torch.zeros_like(arrays.get("query_ids", torch.zeros(0))), **arrays}
        arrays = {"gallery_cams": torch.zeros_like(arrays.get("gallery_ids", torch.zeros(0))), **arrays}
    for name in names:
        if name not in arrays:
            raise UserError(f"--arrays {path}: needs '{name}' for --rule {rule}; has {list(arrays)}")
    columns = [arrays[name].long() for name in names]
    try:
        trial = score(arrays["distance"], (columns[0], columns[1]), (columns[2], columns[3]), rule)
    except ValueError as error:
        raise UserError(f"--arrays {path}: {error}") from error
    return summary(path.name, "", [trial])


if __name__ == "__main__":
    run_tool(main)

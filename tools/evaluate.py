"""Score a trained network, or anybody's features or distances, by the field's protocols.

python tools/evaluate.py RUN [--checkpoint best] [--set data.root=PATH] [--rerank cmfp cmrr:25]
python tools/evaluate.py --weights released.pth --cfg sysu.yaml --set data.root=PATH
python tools/evaluate.py --arrays features.npz --rule sysu --rerank cmfp:30 cmrr:15 aim k-reciprocal
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch.nn import functional as F

from engine import checkpoint, report
from engine.errors import UserError, run_tool
from engine.evaluate import Score, score, summary, trial_distance
from engine.phases import Phases
from engine.rerank import Rerank
from engine.trained import evaluate_checkpoint, evaluate_trained, released

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
    what.add_argument("--weights", metavar="FILE", help="a network that others released, for the data set of --cfg")
    parser.add_argument("--cfg", metavar="NAME", help="configuration, for --weights")
    parser.add_argument("--checkpoint", default="last", metavar="NAME", help="last (default), best, stage1, ...")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    parser.add_argument("--rule", choices=("plain", "sysu", "llcm"), default="plain", help="filter, for --arrays")
    parser.add_argument(
        "--rerank",
        metavar="NAME[:K,...]",
        nargs="+",
        help="re-ranked rows: cmfp, cmrr, aim, k-reciprocal, with the run's settings or others (cmrr:25, aim:30,6)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON too")
    arguments = parser.parse_args()
    if bool(arguments.cfg) != bool(arguments.weights):
        raise UserError(
            "--weights and --cfg belong together: the weights, and the configuration of the data set to score on"
        )
    if arguments.arrays:
        scores = _score_arrays(Path(arguments.arrays), arguments.rule, arguments.rerank or [])
        name = "arrays"
    elif arguments.weights:
        scores = evaluate_trained(released(Path(arguments.weights), arguments.cfg, arguments.set), arguments.rerank)
        name = Path(arguments.weights).name
    else:
        path = checkpoint.locate(arguments.run, arguments.checkpoint)
        scores = evaluate_checkpoint(path, arguments.set, arguments.rerank)
        name = "best (chosen on test scores)" if path.stem == "best" else path.stem
    rows = [(f"{name} + {row.rerank}" if row.rerank else name, row) for row in scores]
    print(report.table(rows))
    if arguments.json:
        content = json.dumps([{"row": label} | asdict(row) for label, row in rows], indent=2)
        checkpoint.write(Path(arguments.json), content.encode())
    return 0


def _score_arrays(path: Path, rule: str, rerank: Sequence[str]) -> list[Score]:
    rerankers = [Rerank().parse(text) for text in rerank]
    if not path.is_file():
        raise UserError(f"--arrays {path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"--arrays {path}: not an .npz file; numpy.savez writes one, see docs/scores.md")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(f"--arrays {path}: not an .npz file of plain arrays ({error})") from error
    missing = {"query_features", "gallery_features"} - arrays.keys()
    if missing and (rerank or "distance" not in arrays):
        needed = " and ".join(sorted(missing))
        needed = f"{needed} to re-rank" if rerank else f"'distance', or {needed}"
        raise UserError(f"--arrays {path}: needs {needed}; has {list(arrays)}")
    try:
        features = [] if missing else _features(path, arrays["query_features"], arrays["gallery_features"])
        names = ["query_ids", "gallery_ids", "query_cams", "gallery_cams"]
        if rule == "plain":
            arrays = {"query_cams": torch.zeros_like(arrays.get("query_ids", torch.zeros(0))), **arrays}
            arrays = {"gallery_cams": torch.zeros_like(arrays.get("gallery_ids", torch.zeros(0))), **arrays}
        for name in names:
            if name not in arrays:
                raise UserError(f"--arrays {path}: needs '{name}' for --rule {rule}; has {list(arrays)}")
        columns = [arrays[name].long() for name in names]
        ids, cams = (columns[0], columns[1]), (columns[2], columns[3])
        distance = arrays["distance"] if "distance" in arrays else trial_distance(*features, None)
        plain, matched = score(distance, ids, cams, rule)
        if not matched:
            raise UserError(
                f"--arrays {path}: no query has an image of its identity in the gallery (--rule {rule}); check that "
                "query_ids and gallery_ids number the same people alike, and the cameras"
            )
        if matched < len(ids[0]):
            lonely = f"{len(ids[0]) - matched} of {len(ids[0])} queries have no match in the gallery"
            warnings.warn(f"{path}: {lonely}, and are left out of the means", stacklevel=1)
        scores = [summary(path.name, "", [(plain, matched)])]
        for reranker in rerankers:
            clock = Phases(torch.device("cpu"))
            trial = score(trial_distance(*features, reranker, clock), ids, cams, rule)
            scores.append(summary(path.name, reranker.label, [trial], clock))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"--arrays {path}: {error}") from error
    return scores


def _features(path: Path, query: torch.Tensor, gallery: torch.Tensor) -> list[torch.Tensor]:
    """Both as unit rows."""
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        shapes = f"{list(query.shape)} and {list(gallery.shape)}"
        raise UserError(f"--arrays {path}: query_features and gallery_features must be [Q, D], [G, D], got {shapes}")
    return [F.normalize(rows.float()) for rows in (query, gallery)]


if __name__ == "__main__":
    run_tool(main)

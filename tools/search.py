"""Find the people of query images, of either modality, in a gallery.

python tools/search.py RUN --gallery FOLDER --query person.png --modality ir
python tools/search.py RUN --gallery FOLDER --index gallery.npz --query FOLDER --json found.json --picture found.png
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from extract import add_network_options

from engine import checkpoint, index, report, search, trained
from engine.data import folder
from engine.errors import UserError, run_tool
from engine.index import Index
from engine.rerank import Aim
from engine.search import Found
from engine.trained import Trained

MOST = 10  # matches that are shown where -k does not tell
PICTURED = 20  # queries in the picture
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
REMEDY = "make room, or choose another place"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = "a folder, with its subfolders; a text file of paths, a line each; or images"
    parser.add_argument("run", metavar="RUN", help="run folder, a checkpoint file, or weights for --cfg")
    parser.add_argument("--query", metavar="IMAGES", nargs="+", required=True, help=place)
    parser.add_argument("--modality", choices=("vis", "ir"), default="ir", help="of the queries (ir)")
    parser.add_argument("--gallery", metavar="IMAGES", nargs="+", help=place)
    parser.add_argument("--gallery-modality", choices=("vis", "ir"), help="of the gallery (the other one)")
    parser.add_argument(
        "--index",
        metavar="FILE",
        help=".npz or .safetensors of the gallery's features; made of --gallery if it is not there",
    )
    parser.add_argument("-k", type=int, metavar="N", help=f"matches of a query ({MOST}, or all if there are fewer)")
    parser.add_argument(
        "--rerank",
        metavar="NAME[:K,...]",
        help="cmfp, cmrr, aim or k-reciprocal; all but aim look at all queries at once",
    )
    parser.add_argument(
        "--faiss", metavar="KIND", help="search by FAISS: flat, ivf, or ivf:LISTS,PROBES, which is approximate"
    )
    parser.add_argument(
        "--rule", choices=("plain", "sysu", "llcm"), default="plain", help="gallery images that a query does not see"
    )
    parser.add_argument("--json", metavar="FILE", help="write the matches as JSON too")
    parser.add_argument(
        "--picture", metavar="FILE", help=f"draw the matches of the first {PICTURED} queries, as .png or .jpg"
    )
    add_network_options(parser)
    arguments = parser.parse_args()
    if arguments.rerank and arguments.faiss:
        raise UserError("--rerank: looks at all distances, which --faiss does not compute; leave one of them away")
    for name in filter(None, (arguments.json, arguments.picture)):
        if not Path(name).absolute().parent.is_dir():
            raise UserError(
                f"{name}: there is no folder {Path(name).absolute().parent}; make it, or choose another place"
            )
    if arguments.picture and Path(arguments.picture).suffix.lower() not in PICTURES:
        raise UserError(f"--picture {arguments.picture}: expected a name that ends in {', '.join(PICTURES)}")
    queries = folder.gather(arguments.query)
    network = trained.take(arguments.run, arguments.checkpoint, arguments.set, arguments.cfg)
    gallery = _gallery(network, arguments)
    query = index.make(
        network,
        queries,
        arguments.modality,
        mirror=gallery.about["mirror"],
        batch=arguments.batch,
        strict=True,
        label="queries",
    )
    nearest = search.exact(gallery, network.device)
    label = "exact, by cosine similarity"
    if arguments.rerank:
        reranker = network.config.evaluate.rerank.parse(arguments.rerank)
        nearest, label = search.reranked(gallery, reranker, network.device), f"re-ranked by {reranker.label}"
        label += "" if isinstance(reranker, Aim) else ", which looks at all queries at once"
    elif arguments.faiss:
        file = Path(arguments.index) if arguments.index else None
        nearest, label = search.approximate(gallery, arguments.faiss, file), f"FAISS {arguments.faiss}"
    k = min(MOST, len(gallery)) if arguments.k is None else arguments.k
    found = search.search(query, gallery, k, nearest, arguments.rule)
    _report(query, gallery, found, label, arguments)
    return 0


def _gallery(network: Trained, arguments: argparse.Namespace) -> Index:
    """The gallery's features: from the index where there is one, else made, and kept in it."""
    if not arguments.gallery and not arguments.index:
        raise UserError("--gallery: needed, or --index with a file of features")
    file = Path(arguments.index) if arguments.index else None
    images = folder.gather(arguments.gallery) if arguments.gallery else None
    if file and (images is None or file.exists()):
        found = index.load(file)
        found.check(network, str(file))
        wanted = arguments.gallery_modality or found.about["modality"]
        if found.about["modality"] != wanted or (arguments.no_mirror and found.about["mirror"]):
            made = f"{found.about['modality']}, {'with' if found.about['mirror'] else 'without'} mirror images"
            raise UserError(f"--index {file}: made otherwise ({made}); ask for the same, or name another file")
        if images and index.stamp(images) != found.about["images"]:
            raise UserError(
                f"--index {file}: made of other images than --gallery has now; remove it to have it made again, or name "
                "another file"
            )
        return found
    assert images is not None
    if file:
        index.check_name(file)
    modality = arguments.gallery_modality or ("vis" if arguments.modality == "ir" else "ir")
    found = index.make(
        network, images, modality, mirror=not arguments.no_mirror, batch=arguments.batch, label="gallery images"
    )
    if file:
        index.save(file, found)
    return found


def _report(query: Index, gallery: Index, found: list[Found], label: str, arguments: argparse.Namespace) -> None:
    """What is asked for as files, then the table, behind which somebody may stop to read."""
    right, could = search.first_right(query.images, gallery.images, found, arguments.rule)
    if arguments.json:
        rows = _rows(query, gallery, found)
        content: dict[str, Any] = {"search": label, "rule": arguments.rule, "gallery": gallery.about, "queries": rows}
        if could:
            content |= {"first_right": right, "queries_with_a_match": could}
        checkpoint.write(Path(arguments.json), json.dumps(content, indent=2).encode(), REMEDY)
    if arguments.picture:
        file, picture = Path(arguments.picture), io.BytesIO()
        sheet = search.sheet(query.images, gallery.images, found[:PICTURED])
        try:
            sheet.save(picture, PICTURES[file.suffix.lower()])
        except (OSError, ValueError) as error:  # a JPEG ends at 65,535 pixels
            raise UserError(
                f"--picture {file}: {sheet.width} x {sheet.height} pixels cannot be encoded ({error}); take .png, or a "
                "smaller -k"
            ) from error
        checkpoint.write(file, picture.getbuffer(), REMEDY)
        if len(found) > PICTURED:
            print(f"{arguments.picture} shows the first {PICTURED} queries", file=sys.stderr)
    query_names, gallery_names = search.names(query.images), search.names(gallery.images)
    known = bool((gallery.images.ids >= 0).any())
    cells = [["query", "gallery image", *(["identity"] if known else []), "place", "score"]]
    for number, matches in enumerate(found):
        for place, (row, score) in enumerate(zip(matches.rows.tolist(), matches.scores.tolist(), strict=True), start=1):
            identity = gallery.images.ids[row]
            words = [query_names[number] if place == 1 else "", gallery_names[row]]
            words += [str(identity) if identity >= 0 else ""] if known else []
            cells.append([*words, str(place), f"{score:.3f}"])
    print(f"{len(query)} queries, {len(gallery)} gallery images; {label}\n")
    print(report.markdown(cells, left=2))
    if could:
        print(f"\nthe right person comes first for {100 * right / could:.2f} % of {could} queries with a match (R1)")


def _rows(query: Index, gallery: Index, found: list[Found]) -> list[dict[str, Any]]:
    """What the JSON file tells of every query."""

    def one(images: Any, row: int) -> dict[str, Any]:
        known = {"identity": int(images.ids[row]), "camera": int(images.cams[row])}
        return {"path": images.paths[row]} | {key: value for key, value in known.items() if value >= 0}

    return [
        one(query.images, number)
        | {
            "matches": [
                {"place": place, "score": score} | one(gallery.images, row)
                for place, (row, score) in enumerate(
                    zip(matches.rows.tolist(), matches.scores.tolist(), strict=True), 1
                )
            ]
        }
        for number, matches in enumerate(found)
    ]


if __name__ == "__main__":
    run_tool(main)

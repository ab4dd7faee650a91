"""Features of images: of a folder, of a list, of single files.

python tools/extract.py RUN FOLDER --modality vis --out gallery.npz
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from engine import index, trained
from engine.data import folder
from engine.errors import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, a checkpoint file, or weights for --cfg")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="a folder, with its subfolders; a text file of paths, a line each; or images",
    )
    parser.add_argument("--modality", choices=("vis", "ir"), required=True, help="of the images")
    parser.add_argument("--out", metavar="FILE", required=True, help="features.npz or features.safetensors")
    parser.add_argument(
        "--strict", action="store_true", help="refuse unreadable images, which else are named and left out"
    )
    add_network_options(parser)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    index.check_name(out)
    images = folder.gather(arguments.images)
    network = trained.take(arguments.run, arguments.checkpoint, arguments.set, arguments.cfg)
    found = index.make(
        network,
        images,
        arguments.modality,
        mirror=not arguments.no_mirror,
        batch=arguments.batch,
        strict=arguments.strict,
    )
    index.save(out, found)
    print(f"{out}: {len(found)} images, {found.features.shape[1]} dimensions")
    return 0


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What a tool asks about the network of RUN and about how it looks at images."""
    parser.add_argument(
        "--no-mirror", action="store_true", help="features of the images alone, without their mirror images"
    )
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images of a forward pass (evaluate.batch)")
    parser.add_argument(
        "--cfg", default="", metavar="NAME", help="configuration, where RUN is weights that others released"
    )
    parser.add_argument("--checkpoint", default="last", metavar="NAME", help="last (default), best, stage1, ...")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")


if __name__ == "__main__":
    run_tool(main)

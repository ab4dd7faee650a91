"""Write a trained network as an ONNX or a torch.export file, which is checked before it is kept.

python tools/export.py RUN --format onnx --modality both --out network.onnx
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# To be said before torch loads: threads that spin while they wait cost tenfold where something else holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from engine import export, trained
from engine.errors import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, a checkpoint file, or weights for --cfg")
    parser.add_argument(
        "--format", choices=tuple(export.SUFFIXES), required=True, help="onnx, or torch for torch.export"
    )
    parser.add_argument("--modality", choices=("vis", "ir", "both"), required=True, help="of the images that go in")
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="network.onnx or network.pt2; FILE.json describes it"
    )
    parser.add_argument("--no-mirror", action="store_true", help="features of the images alone, at half the cost")
    parser.add_argument(
        "--cfg", default="", metavar="NAME", help="configuration, where RUN is weights that others released"
    )
    parser.add_argument("--checkpoint", default="last", metavar="NAME", help="last (default), best, stage1, ...")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    arguments = parser.parse_args()
    network = trained.take(arguments.run, arguments.checkpoint, [*arguments.set, "device=cpu"], arguments.cfg)
    modalities = ("vis", "ir") if arguments.modality == "both" else (arguments.modality,)
    out = Path(arguments.out)
    about = export.export(network, out, arguments.format, modalities, not arguments.no_mirror)
    for side in ("inputs", "outputs"):
        for name, one in about[side].items():
            print(f"{name:<14} {one['type']:<8} {one['shape']}")
    difference = about["largest_difference_from_pytorch"]
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; features differ from PyTorch's by {difference:.1e} at most")
    return 0


if __name__ == "__main__":
    run_tool(main)

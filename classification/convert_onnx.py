# SPDX-License-Identifier: Apache-2.0
"""Exports a trained classifier to ONNX, for TensorRT and other runtimes. From this folder, as in the public release:

    python convert_onnx.py --cfg configs/litv2-small.yaml --resume FILE       # ./litv2_small.onnx, for batches of 64 images
    trtexec --onnx=litv2_small.onnx --saveEngine=litv2_small.trt --fp16

The graph has standard operators only, and its outputs are compared with the model's before it is kept. For other formats, dynamic
sizes and quantization see ``python -m litv2 export --help``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 and hilo of this checkout, installed or not

from config import load_config
from litv2.errors import UserError, run_program
from litv2.export import Settings, classifier, export
from litv2.weights.download import fetch
from litv2.weights.reading import read_checkpoint
from litv2.weights.state_dict import find_weights, load_weights
from network import build_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration of the model")
    parser.add_argument("--resume", required=True, metavar="FILE", help="its weights: a file, a URL or a zoo name")
    parser.add_argument("--opts", nargs="+", metavar="KEY VALUE", help="any key of config.py")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch of the graph; default: 64")
    parser.add_argument("--out", metavar="FILE", help="default: MODEL.NAME.onnx in this folder")
    args = parser.parse_args(argv)

    config = load_config(args.cfg, args.opts, note=print)
    weights = find_weights(read_checkpoint(fetch(args.resume)))
    if "head.weight" not in weights:
        raise UserError(f"{args.resume} holds no classifier")
    model = build_model(config, num_classes=len(weights["head.weight"]))
    load_weights(model, weights)
    side = config.TEST.IMG_SIZE or config.DATA.IMG_SIZE
    out = args.out or f"{config.MODEL.NAME}.onnx"
    export(classifier(model), "onnx-standard", out, Settings((side, side), args.batch_size, dynamic=()))
    print(f"written to {out}, the report to {out}.parity.json")


if __name__ == "__main__":
    sys.exit(run_program(main))

"""MaskSparsity of a torchvision network on an ImageNet-style folder (lesson 09).

On one processor, or on several. FOLDER holds train/<class>/* and val/<class>/*:

    python imagenet.py FOLDER
    torchrun --nproc_per_node=8 imagenet.py FOLDER  # eight GPUs share every batch

The defaults are the released settings of ResNet-50 with 51.07 % fewer FLOPs (arXiv
2201.06776), but for five things: the learning rate falls after half and three quarters
of a phase, not after 30, 60 and 90 epochs; the mask is taken for a number of MACs, not
at |γ| < 0.01; one image of a hundred is held out; training starts from torchvision's
weights; images are scaled as everywhere in mslib, which those weights must get used to.
Stop it at any time: the same command goes on from the last finished epoch.
"""

import argparse
import os
from pathlib import Path

import torch

import mslib as ms

SETTINGS = {
    "network": "resnet50",
    "weights": "IMAGENET1K_V1",
    "size": 224,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "seed": 0,
    "epochs": 100,
    "lr": 0.1,
    "strength": 5e-4,
    "reduction": 0.5107,
    "finetune_epochs": 40,
    "finetune_lr": 5e-4,
    "workers": 8,
    "runs": "runs/imagenet",
}


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    for name, value in SETTINGS.items():
        text = f"default {value}"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    return parser.parse_args()


def main():
    o = options()
    runs = Path(o.runs)
    data = ms.load_folder(o.folder, o.size, o.batch_size, val=0.01, workers=o.workers)
    example = data.example
    common = dict(batch_size=o.batch_size, schedule="step", seed=o.seed)
    common["weight_decay"] = o.weight_decay
    sparse = common | {"epochs": o.epochs, "lr": o.lr}
    repair = common | {"epochs": o.finetune_epochs, "lr": o.finetune_lr}

    def trained():
        torch.manual_seed(o.seed)
        return ms.network(o.network, len(data.classes), o.weights or None)

    model = trained()  # lesson 02: every γ under the penalty, for the mask
    penalty = ms.GlobalL1(model, example, o.strength, residual=True)
    ms.fit(model, data, **sparse, penalty=penalty, run=runs / "global")
    masks = ms.masks_for_macs(model, example, o.reduction, residual=True, round_to=8)

    model = trained()  # lesson 03: back to the start, the penalty on what goes only
    penalty = ms.MaskedL1(model, masks, o.strength)
    ms.fit(model, data, **sparse, penalty=penalty, run=runs / "masked")

    small = ms.prune(model, masks, example, fold_bias=True)  # lessons 04 and 05
    ms.fit(small, data, **repair, run=runs / "finetune")
    if os.environ.get("RANK", "0") == "0":
        top1 = f"top-1 {ms.evaluate(small, data.test):.2f} %"
        print(f"{ms.cost(small, example)} of {ms.cost(model, example)}, {top1}")


if __name__ == "__main__":
    main()

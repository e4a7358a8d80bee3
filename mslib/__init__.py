"""mslib: make a convolutional network smaller and faster by pruning-aware sparse regularization.

    import mslib as ms

Three floors, in the order in which one reads them:

- `pruning`: how a network is cut. ChannelGraph, channel_groups; gammas, filter_norms,
  outgoing_norms, weight_norms; taylor_scores, fpgm_scores, lamp_scores, hrank_scores,
  ranked_scores; masks_below, masks_for_macs, masks_for_ratio, save_masks, load_masks; prune,
  zero_masked, cut_optimizer_state; widen, merge.
- `penalties`: the methods. GlobalL1, MaskedL1, push; DependencyL1; GrowingL2, Incremental,
  Trainability; SoftFilter, SoftShrinkage, GroupEnvelope; FeatureFlow, flows; HoldZero. They add up;
  Penalty is the base class of one's own.
- `training`: how it is trained. fit, evaluate, recalibrate, learning_rates, environment.

`recipes` join them: sensitivity; cut_schedule, prune_gradually.

They stand on `data` (load_data, load_folder, Data, Split, normalize, steps_per_epoch), `networks`
(resnet, vgg, network, untrained, save, load), `costs` (cost, latency), `exports` (export,
OnnxNetwork) and `quantization` (quantize). Above them, loaded only when asked for, is the `course`
(config, stage, require, data_of, image_folder, reference, recovery, published, scoreboard,
decisions, tables, plots, diagrams, exercises).
"""

from importlib import import_module
from typing import Any

from .costs import cost, latency
from .data.sources import load_data, load_folder
from .data.tensors import Data, Split, normalize, steps_per_epoch
from .exports import OnnxNetwork, export
from .networks import PaddedShortcut, load, network, resnet, save, untrained, vgg
from .penalties.base import HoldZero, Penalty
from .penalties.dependency import DependencyL1
from .penalties.envelope import GroupEnvelope
from .penalties.flow import FeatureFlow, flows
from .penalties.gamma import GlobalL1, MaskedL1, push
from .penalties.growing import GrowingL2
from .penalties.incremental import Incremental
from .penalties.shrinkage import SoftShrinkage
from .penalties.soft import SoftFilter
from .penalties.trainability import Trainability
from .pruning.criteria import fpgm_scores, hrank_scores, lamp_scores, taylor_scores
from .pruning.graph import ChannelGraph
from .pruning.groups import channel_groups
from .pruning.maskfiles import load_masks, save_masks
from .pruning.masks import masks_below, masks_for_macs, masks_for_ratio
from .pruning.ranking import ranked_scores
from .pruning.scores import filter_norms, gammas, outgoing_norms, weight_norms
from .pruning.surgery import cut_optimizer_state, prune, zero_masked
from .pruning.widening import merge, widen
from .quantization import quantize
from .recipes import cut_schedule, prune_gradually, sensitivity
from .training.loop import evaluate, fit, recalibrate
from .training.runs import environment
from .training.schedules import learning_rates

__version__ = "0.2.0"

_COURSE = {  # name -> the module of the course that has it
    "config": "settings",
    "data_of": "stages",
    "decisions": "results",
    "diagrams": "diagrams",
    "exercises": "exercises",
    "image_folder": "images",
    "plots": "plots",
    "published": "results",
    "recovery": "results",
    "reference": "results",
    "require": "lessons",
    "scoreboard": "results",
    "stage": "stages",
    "tables": "results",
}

__all__ = [
    "ChannelGraph",
    "Data",
    "DependencyL1",
    "FeatureFlow",
    "GlobalL1",
    "GroupEnvelope",
    "GrowingL2",
    "HoldZero",
    "Incremental",
    "MaskedL1",
    "OnnxNetwork",
    "PaddedShortcut",
    "Penalty",
    "SoftFilter",
    "SoftShrinkage",
    "Split",
    "Trainability",
    "channel_groups",
    "cost",
    "cut_optimizer_state",
    "cut_schedule",
    "environment",
    "evaluate",
    "export",
    "filter_norms",
    "fit",
    "flows",
    "fpgm_scores",
    "gammas",
    "hrank_scores",
    "lamp_scores",
    "latency",
    "learning_rates",
    "load",
    "load_data",
    "load_folder",
    "load_masks",
    "masks_below",
    "masks_for_macs",
    "masks_for_ratio",
    "merge",
    "network",
    "normalize",
    "outgoing_norms",
    "prune",
    "prune_gradually",
    "push",
    "quantize",
    "ranked_scores",
    "recalibrate",
    "resnet",
    "save",
    "save_masks",
    "sensitivity",
    "steps_per_epoch",
    "taylor_scores",
    "untrained",
    "vgg",
    "weight_norms",
    "widen",
    "zero_masked",
    *_COURSE,
]


def __getattr__(name: str) -> Any:
    """Names of the course load their module, and with it matplotlib, when they are first used."""
    if name not in _COURSE:
        raise AttributeError(f"module 'mslib' has no attribute {name!r}")
    module = import_module(f".course.{_COURSE[name]}", __name__)
    return module if name == _COURSE[name] else getattr(module, name)

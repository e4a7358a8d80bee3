"""mslib: make a convolutional network smaller and faster by pruning-aware sparse regularization.

    import mslib as ms

`__all__` below lists what there is, by subject. Three floors, in the order in which one reads them:
`pruning` cuts a network, `penalties` are the methods, `training` trains it; `recipes` join them.
The course, and with it matplotlib, is loaded only when it is asked for.
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
    "stage": "stages",
    "require": "lessons",
    "data_of": "stages",
    "image_folder": "images",
    **dict.fromkeys(("reference", "recovery", "tradeoff", "published"), "results"),
    **dict.fromkeys(("scoreboard", "decisions", "half_width", "chance", "tables"), "results"),
    "plots": "plots",
    "diagrams": "diagrams",
    "exercises": "exercises",
}

# pruning: how a network is cut
__all__ = ["ChannelGraph", "channel_groups", "gammas", "filter_norms", "outgoing_norms"]
__all__ += ["weight_norms", "taylor_scores", "fpgm_scores", "lamp_scores", "hrank_scores"]
__all__ += ["ranked_scores", "masks_below", "masks_for_macs", "masks_for_ratio", "save_masks"]
__all__ += ["load_masks", "prune", "zero_masked", "cut_optimizer_state", "widen", "merge"]
# penalties: the methods, which add up; Penalty is the base class of one's own
__all__ += ["GlobalL1", "MaskedL1", "push", "DependencyL1", "GrowingL2", "Incremental"]
__all__ += ["Trainability", "SoftFilter", "SoftShrinkage", "GroupEnvelope", "FeatureFlow", "flows"]
__all__ += ["HoldZero", "Penalty"]
# training: how it is trained; recipes, which join the three
__all__ += ["fit", "evaluate", "recalibrate", "learning_rates", "environment"]
__all__ += ["sensitivity", "cut_schedule", "prune_gradually"]
# what they stand on: data, networks, costs, exports, quantization
__all__ += ["load_data", "load_folder", "Data", "Split", "normalize", "steps_per_epoch"]
__all__ += ["resnet", "vgg", "network", "untrained", "save", "load", "PaddedShortcut"]
__all__ += ["cost", "latency", "export", "OnnxNetwork", "quantize"]
# the course
__all__ += [*_COURSE]


def __getattr__(name: str) -> Any:
    """Names of the course load their module, and with it matplotlib, when they are first used."""
    if name not in _COURSE:
        raise AttributeError(f"module 'mslib' has no attribute {name!r}")
    module = import_module(f".course.{_COURSE[name]}", __name__)
    return module if name == _COURSE[name] else getattr(module, name)

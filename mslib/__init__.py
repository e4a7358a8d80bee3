"""mslib: make a convolutional network smaller and faster by pruning-aware sparse regularization.

    import mslib as ms

Networks: resnet, vgg, network, save, load, export. Images: load_data, load_folder, image_folder.
Training: fit, evaluate, recalibrate.
Penalties: GlobalL1, MaskedL1, push; GrowingL2; FeatureFlow (flows); HoldZero; they add up.
Masks and surgery: masks_below, masks_for_macs, masks_for_ratio, channel_groups, prune, zero_masked. Cost: cost, latency.
The course: config, stage, require, reference, published, scoreboard; figures in ms.plots.
"""

from . import models, plots
from .config import config, notebook_config
from .cost import cost, latency
from .course import data_of, published, reference, require, scoreboard, stage
from .data import normalize
from .datasets import image_folder, load_data, load_folder
from .export import export
from .files import ROOT
from .flow import FeatureFlow, flows
from .graph import ChannelGraph
from .groups import channel_groups
from .growing import GrowingL2
from .masks import (
    filter_norms,
    gammas,
    load_masks,
    masks_below,
    masks_for_macs,
    masks_for_ratio,
    outgoing_norms,
    save_masks,
    weight_norms,
)
from .models import PaddedShortcut, load, network, resnet, save, vgg
from .penalties import GlobalL1, HoldZero, MaskedL1, push
from .prune import prune, zero_masked
from .runs import environment
from .train import evaluate, fit, learning_rates, recalibrate

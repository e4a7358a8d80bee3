"""The groups of channels that can only be removed together, for people to read."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ..costs import cost
from .graph import ChannelGraph, Network, as_graph
from .labels import NO_CHANNEL


@dataclass(frozen=True)
class Group:
    """Channels that go together, by the names of modules that write, scale and read them."""

    size: int
    writers: tuple
    norms: tuple
    readers: tuple
    reason: str = ""  # why it cannot be pruned; empty if it can
    macs: int = 0  # multiply-accumulates of one image that would go with all of it

    def __str__(self) -> str:
        norms = short(self.norms) or "no BatchNorm"
        kept = self.reason and f"  [kept: {self.reason}]"
        path = f"{short(self.writers)} -> {norms} -> {short(self.readers)}"
        return f"{self.size} channels: {path}{kept}"


class Groups(list):
    """A list of `Group`s that prints as a table, in a terminal and in a notebook."""

    def table(self) -> pd.DataFrame:
        """A row a group: channels, written by, scaled by, read by, free (or why not), M MACs."""
        rows = (
            {
                "channels": g.size,
                "written by": short(g.writers),
                "scaled by": short(g.norms),
                "read by": short(g.readers),
                "free": g.reason or ("yes" if g.norms else "no BatchNorm scales it"),
                "M MACs": g.macs / 1e6,
            }
            for g in self
        )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return self.table().to_string(float_format="%.2f")

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="%.2f")


def short(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def channel_groups(model: Network, example: Any = None) -> Groups:
    """The `Groups` of `model`, in the order of the network; print them to read which layers move
    together, and why.

    example: what the network's forward takes, such as float [N, C, H, W] (left out for a
    `ChannelGraph`). Raises ValueError when the network cannot be traced.
    """
    graph = as_graph(model, example)
    layers = cost(graph.model, graph.example).layers
    order = {name: i for i, name in enumerate(graph.outputs)}
    found = []
    for (writers, norms, readers, reason), roots in members(graph).items():
        drop = torch.isin(graph.root, torch.tensor(roots))
        shares = graph.shares_left(drop)
        gone = round(sum(macs * (1 - shares.get(name, 1.0)) for name, macs in layers.items()))
        size = int(drop[graph.outputs[writers[0]]].sum()) if writers else len(roots)
        found.append(Group(size, writers, norms, readers, reason, gone))
    return Groups(sorted(found, key=lambda g: min((order[n] for n in g.writers), default=0)))


def members(graph: ChannelGraph) -> dict[tuple, list[int]]:
    """(writers, norms, readers, reason) -> roots of the channels that these modules share."""
    # root -> ({writers}, {norms}, {readers}), dictionaries for their order
    touching: dict[int, tuple[dict, dict, dict]] = {}
    for place, table in enumerate((graph.outputs, graph.norms, graph.inputs)):
        for name, ids in table.items():
            for root in set(graph.root[ids].tolist()) - {NO_CHANNEL}:
                touching.setdefault(root, ({}, {}, {}))[place][name] = None
    found: dict[tuple, list[int]] = {}
    for root, places in touching.items():
        key = (*map(tuple, places), graph.reasons.get(root, ""))
        found.setdefault(key, []).append(root)
    return found

"""The trade-off of global and masked sparsity, on drawn images and a small network."""

import pandas as pd
import torch
import yaml

import mslib as ms
from mslib.files import ROOT
from tools import tradeoff

PROTOCOL = ROOT / "data" / "reference" / "tradeoff-cifar10.yml"


def test_every_strength_has_its_curve_and_masked_the_masks_of_one(tmp_path, monkeypatch):
    data = ms.load_data("shapes", image_size=8, sizes=(120, 60))
    monkeypatch.setattr(ms, "load_data", lambda name: data)
    file = tmp_path / "tradeoff.yml"
    small = dict(depth=14, seed=[0], epochs=1, prepare=1, repairs=[1, 2])
    small |= dict(global_push=[0.1, 3], mask_push=3, masked_push=[0.2, 9])
    small["global-twice_push"] = [3]
    file.write_text(yaml.safe_dump(yaml.safe_load(PROTOCOL.read_text()) | small))
    words = [str(file), "--runs", str(tmp_path / "runs")]
    tradeoff.main(words)
    table = pd.read_csv(tmp_path / "tradeoff.csv", dtype={"station": str})
    assert not table.duplicated(tradeoff.KEY).any()
    curves = table.groupby(["method", "push"]).station.agg(list).to_dict()
    curve = ["before", "cut", "folded", "1", "2"]
    pushed = {(m, p): curve for m in ("global", "masked") for p in small[f"{m}_push"]}
    twice = {("global-twice", 3): curve}
    assert curves == pushed | twice | {("dense", 0): ["0", "1", "3"], ("scratch", 0): ["4"]}
    moved = {}  # (method, push) -> mean |γ| of all channels behind the penalty
    for method, push in pushed:
        name = f"global-push-{push:g}" if method == "global" else f"0.5/push-{push:g}/masked"
        net = ms.load(next((tmp_path / "runs").glob(f"*/{name}/model.pt")))
        found = ms.gammas(net, data.example)
        moved[method, push] = float(torch.cat([*found.values()]).mean())
    assert moved["global", 3] < moved["global", 0.1] and moved["masked", 9] < moved["masked", 0.2]
    folded = table[table.station == "folded"].set_index(["method", "push"])
    masked = folded.loc["masked"]
    assert set(masked.params) == {folded.params["global", 3]}  # the same widths
    assert set(table[table.method == "scratch"].params) == set(masked.params)

    def fails(*args, **kwargs):
        raise AssertionError("a training that is not needed")

    monkeypatch.setattr(ms, "fit", fails)
    tradeoff.main(words)
    assert len(pd.read_csv(tmp_path / "tradeoff.csv")) == len(table)

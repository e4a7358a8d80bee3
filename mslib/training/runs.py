"""The folder of one training: its settings, checkpoints that survive a crash, and what it measured."""

import logging
import math
import platform
import re
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from ..files import read_json, read_tensors, write_json, write_tensors

log = logging.getLogger("mslib")


class Run:
    """A folder with settings.json, the two newest epoch-NNNN.pt while training, and at the end model.pt, gammas.pt,
    penalty.pt (if the penalty has a state) and history.json (written last: it marks the run as finished).

    Raises ValueError when the folder was made with other settings; nothing in it is touched then.
    """

    def __init__(self, path, settings):
        self.path = Path(path)
        if (self.path / "settings.json").exists():
            check_settings(self.path, read_json(self.path / "settings.json"), settings)
        else:
            write_json(self.path / "settings.json", settings)

    @property
    def finished(self):
        return (self.path / "history.json").exists()

    def checkpoints(self):
        """Paths of the checkpoints, newest first."""
        return sorted(self.path.glob("epoch-*.pt"), reverse=True)

    def save_checkpoint(self, epoch, state):
        write_tensors(self.path / f"epoch-{epoch:04d}.pt", state)
        for old in self.checkpoints()[2:]:
            old.unlink()

    def latest(self):
        """The newest checkpoint that can be read, or None; a damaged one is named and passed over."""
        for path in self.checkpoints():
            try:
                return read_tensors(path)
            except ValueError as error:
                log.warning("%s; using the checkpoint before it", error)
        return None

    def finish(self, history, seconds):
        write_json(
            self.path / "history.json",
            {"epochs": history, "seconds": round(seconds)} | environment(),
        )
        for path in self.checkpoints():
            path.unlink()


def read_history(path):
    """The history of the finished run in folder `path`, one row an epoch."""
    return pd.DataFrame(read_json(Path(path) / "history.json")["epochs"])


def check_settings(folder, have, want):
    """ValueError that names each setting in which the folder's run differs from the one wanted."""
    differ = [k for k in sorted({*have, *want}) if not _same(have.get(k), want.get(k))]
    if differ:
        values = ", ".join(f"{k}={have.get(k)!r} (now {want.get(k)!r})" for k in differ)
        raise ValueError(
            f"{folder} holds a run made with other settings: {values}; give another folder, or delete this one"
        )


def _same(a, b):
    """Equal, numbers up to 1e-5 of themselves (a drawn weight may differ in its last bit between machines)."""
    return (
        a == b or isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-5)
    )


def environment():
    """What a figure depends on besides its settings: versions, hardware, date."""
    return {
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "hardware": f"{torch.cuda.get_device_name()}, {_cpu()}"
        if torch.cuda.is_available()
        else f"{_cpu()}, CPU",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def _cpu():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()

"""What tests share: small data, lively networks, how processes are shared out, what a run costs."""

import os
import tarfile
from pathlib import Path

# what is tested is exact on the CPU; set it to a GPU's number to try one
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from xdist.scheduler import LoadFileScheduling  # noqa: E402

import mslib as ms  # noqa: E402
from mslib.data.tensors import Data, Split  # noqa: E402

EVERY = 25  # of the real images one is looked at; MSLIB_WHOLE_CIFAR=1: all of them
WHOLE_CIFAR = os.environ.get("MSLIB_WHOLE_CIFAR") == "1"
ALONE = ("tests/", "notebooks/00", "notebooks/09", "notebooks/10")  # need no other lesson
SHARED = Path(os.environ.get("MSLIB_SHARED", "../shared"))


class ByFile(LoadFileScheduling):
    """What a process takes as a whole: a file of tests, or lessons that need each other."""

    def _split_scope(self, nodeid):
        return super()._split_scope(nodeid) if nodeid.startswith(ALONE) else "course"


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter):
    """The processor's time of this process and of all that it started and waited for."""
    user, system, of_children_user, of_children_system, _ = os.times()
    minutes = (user + system + of_children_user + of_children_system) / 60
    terminalreporter.write_line(f"CPU-minutes (user + system): {minutes:.1f}")


@pytest.fixture
def data():
    """Small drawn images in which a tiny network can learn something."""
    return ms.load_data("shapes", image_size=8, sizes=(200, 50))


@pytest.fixture(scope="session")
def cifar():
    path = SHARED.resolve() / "data" / "cifar10-jpeg.tar.gz"
    if not path.exists():
        pytest.skip(
            "the CIFAR-10 JPEG copy is not here; set MSLIB_SHARED to the folder that holds "
            "data/cifar10-jpeg.tar.gz"
        )
    return path


@pytest.fixture(scope="session")
def few_cifar(cifar, tmp_path_factory):
    """A small archive with every 25th image of the copy, of both splits: 240 of each class."""
    path = tmp_path_factory.mktemp("cifar") / "few.tar"
    with tarfile.open(cifar) as whole, tarfile.open(path, "w") as few:
        for member in whole:
            if member.isfile() and int(Path(member.name).stem) % EVERY == 0:
                few.addfile(member, whole.extractfile(member))
    return path


def kill_with_its_children(process):
    """kill -9 a process alone: those that it started have to notice, and end. Returns how many."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    return len(children)


def lively(model, seed=0):
    """Random BatchNorms, as after training: every channel matters. In evaluation mode."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, 0.1, 1)
            nn.init.normal_(m.bias, 0, 0.3)
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


def tiny_data(n=64, size=8, classes=3):
    """Random images of `classes` classes, the same for training, validation and test."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(n) % classes)
    return Data("random", split, split, split, tuple("abc"[:classes]))

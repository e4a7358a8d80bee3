"""No file makes us work for long: what reading one may cost before it is refused."""

import re
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

SECONDS, MEGABYTES = 2, 300


@contextmanager
def bounded(seconds=SECONDS, megabytes=MEGABYTES):
    """What is done in the block takes little of the processor, and little memory at a time.

    The processor's time, of all threads, is what a busy machine leaves as it is. The memory is the
    largest that this process occupied in the meantime, more than it did before.
    """
    before, began = _peak(anew=True), time.process_time()
    yield
    spent, grown = time.process_time() - began, (_peak() - before) / 2**20
    assert spent <= seconds, f"{spent:.1f} CPU-seconds"
    assert grown <= megabytes, f"{grown:.0f} MB more"


def _peak(anew=False):
    """The most bytes of memory that this process has occupied; `anew`: counted from now on.

    Only Linux can count anew. Elsewhere it is the most since the process began: what stays below
    that is not noticed.
    """
    own = Path("/proc/self")
    try:
        if anew:
            (own / "clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", (own / "status").read_text()).group(1))
    except (OSError, AttributeError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

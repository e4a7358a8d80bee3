"""One line of progress that looks right in a notebook, in a terminal and in a log file."""

import os
import sys
import time

from ..processes import rank


class Progress:
    """`update` shows the state of the moment; `close` leaves the last line standing.

    Notebook: one output, updated in place. Terminal: one line. Elsewhere: a line for each `keep`.
    A file named by the variable MSLIB_LOG gets the lines of `keep` too: so the command line shows
    what a notebook in another process is doing. Under torchrun only the first process speaks.
    A training does not end because its progress cannot be written.
    """

    def __init__(self, title: str):
        self.title, self.shown, self.handle = title, 0.0, None
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.notebook = type(shell).__name__ == "ZMQInteractiveShell"
        self.terminal = not self.notebook and sys.stderr.isatty()

    def update(self, text: str, keep: bool = False) -> None:
        """Show `text`, at most twice a second; with `keep`, always."""
        if rank() or not keep and time.monotonic() - self.shown < 0.5:
            return
        self.shown = time.monotonic()
        try:
            self._show(f"{self.title}: {text}", keep)
        except OSError:  # a full disk, a pipe that nobody reads any more
            pass
        try:
            if keep and os.environ.get("MSLIB_LOG"):
                with open(os.environ["MSLIB_LOG"], "a", encoding="utf-8") as log:
                    log.write(f"{self.title}: {text}\n")
        except OSError:
            pass

    def _show(self, line, keep):
        if self.notebook:
            from IPython.display import display

            content = {"text/plain": line}
            if self.handle is None:
                self.handle = display(content, raw=True, display_id=True)
            else:
                self.handle.update(content, raw=True)
        elif self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif keep:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self.terminal and not rank():
            print(file=sys.stderr)

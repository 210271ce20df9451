"""How long work says how far it is: a line, or a progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called with what is being done now.
Say = Callable[[str], None]
# Called with the steps done, and with all there are.
Progress = Callable[[int, int], None]


@contextmanager
def progress_bar(what: str, is_shown: bool = True) -> Iterator[Progress]:
    """Show what is done from its first step on; yields a function of steps done, and of all."""
    if not is_shown:
        yield lambda done, total: None
        return
    import rich.console
    from rich import progress

    columns = (
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=rich.console.Console(stderr=True))
    tasks: list[progress.TaskID] = []

    def update(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bar.add_task(what))
            bar.start()
        bar.update(tasks[0], completed=done, total=total)

    try:
        yield update
    finally:
        # One that was not started would print an empty line.
        if tasks:
            bar.stop()

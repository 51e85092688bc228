"""Progress on stderr while work goes on; silent when stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps called `what`, with the time left; yield what ends a step, with a remark."""
    with tqdm(total=total, desc=what, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True) as shown:

        def step(remark: str) -> None:
            shown.set_postfix_str(remark, refresh=False)
            shown.update()

        yield step

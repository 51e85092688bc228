"""Points where a fault can be asked for: every operation of the store on the disk is one, so that tests can fail each.

`QUANTFORGE_FAILPOINT=NAME[:K[+]]:ACTION` lets the K-th time that NAME is reached (the first by default) end in ACTION;
with a plus, every later time too. The NAME `*` counts all points together. Without the variable nothing ever happens.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

POINTS = {
    "staging.make": "a staging folder is made beside the output",
    "staging.filled": "all files stand in the staging folder, unsynced",
    "staging.sync": "a file or folder of the staging folder is synced",
    "staging.rename": "the staging folder takes the name of the output",
    "staging.exchange": "the staging folder and an old output swap their names",
    "staging.aside": "an old output is moved away, or back, where names cannot be swapped",
    "staging.parent": "the folder of the output is synced",
    "stream.write": "a piece is written to a file that is written piece by piece",
    "raw.remove": "the tensors of a file, as they came, are removed once the file stands",
    "file.write": "a small file is written under a name of its own",
    "file.sync": "that file is synced",
    "file.rename": "that file takes its name",
    "file.folder": "the folder of that file is synced",
    "object.write": "an object of the journal is written under a name of its own",
    "object.rename": "that object takes the name of its digest",
    "object.sync": "an object is synced before it is committed",
    "object.folder": "the folder of the objects is synced",
    "journal.made": "the folder of the journal's folder is synced",
    "journal.append": "a line is appended to the journal",
    "journal.sync": "the journal is synced, which commits the line",
    "journal.committed": "a commit is done, and what it no longer needs is still there",
    "journal.cut": "a bad end is cut off the journal",
    "journal.drop": "an object that is no longer needed is removed",
    "journal.finish": "the journal's folder gets a name that is swept up",
}
ACTIONS = ("kill", "exit", "torn", "ENOSPC", "EIO")
VARIABLE = "QUANTFORGE_FAILPOINT"
_reached: Counter[tuple[str, str]] = Counter()


def reset() -> None:
    """Count from the beginning again."""
    _reached.clear()


def reach(point: str) -> bool:
    """End as the environment asks for at `point`; return whether the caller is to write half, and then call `kill`.

    Raises OSError for "ENOSPC" and "EIO", SystemExit for "exit"; "kill" never returns.
    """
    assert point in POINTS, point
    setting = os.environ.get(VARIABLE)
    if not setting:
        return False
    name, _, rest = setting.partition(":")
    when, _, action = rest.rpartition(":")
    assert action in ACTIONS, setting
    if name not in ("*", point):
        return False
    _reached[setting, name] += 1
    time, wanted = _reached[setting, name], int(when.rstrip("+") or 1)
    if time < wanted or (time > wanted and not when.endswith("+")):
        return False
    if action == "torn" and point.endswith((".write", ".append")):
        return True
    if action in ("kill", "torn"):
        kill()
    if action == "exit":
        raise SystemExit(1)
    number = getattr(errno, action)
    raise OSError(number, os.strerror(number))


def kill() -> None:
    """End this process as a loss of power would: at once, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)

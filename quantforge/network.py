"""Whether the hub can be reached, answered soon: a missing network must cost seconds, not a library's retries."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

PROBE_SECONDS = 5.0


def reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Return whether the hub answers a HEAD request within `seconds`."""
    from huggingface_hub import constants, get_session

    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds).status_code < 500)

    # in a thread: no timeout of the HTTP client covers the look-up of the name
    probe = Thread(target=ask, daemon=True)
    probe.start()
    probe.join(seconds)
    return any(answers)

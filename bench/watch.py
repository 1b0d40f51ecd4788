"""Looks on while a training script runs, for speed.py, which has Python run this file before the
script.

A thread waits until the script has defined `choose_actions` and `ppo_update`, and puts functions
around them that append a line to the file $WATCH_LOG: "decision" (the first), "learning" and "learnt"
with the time, in seconds since 1970.
"""

import os
import sys
import threading
import time
from typing import Any


def note(what: str) -> None:
    with open(os.environ["WATCH_LOG"], "a") as file:
        file.write(f"{what} {time.time()}\n")


def watch() -> None:
    script: Any = sys.modules["__main__"]
    while not (hasattr(script, "choose_actions") and hasattr(script, "ppo_update")):
        time.sleep(0.002)
    choose, update = script.choose_actions, script.ppo_update

    def first_choice(*args: Any, **settings: Any) -> Any:
        script.choose_actions = choose
        note("decision")
        return choose(*args, **settings)

    def watched_update(*args: Any, **settings: Any) -> Any:
        note("learning")
        result = update(*args, **settings)
        note("learnt")
        return result

    script.choose_actions, script.ppo_update = first_choice, watched_update


if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
    threading.Thread(target=watch, daemon=True).start()

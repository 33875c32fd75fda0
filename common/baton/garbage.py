"""Python's garbage collector in a process that serves."""

import gc


def tune_garbage_collector() -> None:
    """For a process that serves and does little else, once it is set up: what is there now is not looked at again,
    and what comes and goes with requests less often; reference counts free nearly all of it at once. A full
    collection with torch and transformers loaded holds every thread for more than a tenth of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)

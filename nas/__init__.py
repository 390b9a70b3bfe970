"""Step-aware neural architecture search for diffusion models: the engine. It knows no UNet and no FID.

From Python, `nas.open_run(study)` is what the commands are a skin of; `nas.load_study`, `nas.Study`, `nas.UserError` go with it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

LOOKS = 3_000
"""How often a CPU thread of torch that waits for others looks before it sleeps. Of OpenMP's own 300,000 training on all cores slows down many times over
as soon as anything else wants a core; of 1,000 two threads were slower than one where that was measured (`benchmarks.threads`)."""
# Read by OpenMP when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", str(LOOKS))
KERNELS = 16_384
"""How many of the kernels that oneDNN compiles on a CPU are kept. A fine-tune of a schedule has batches of many sizes for each of its networks, more than
the 1,024 that it keeps of its own accord (`benchmarks.kernels`)."""
# Read by oneDNN at its first kernel.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))

if TYPE_CHECKING:
    from nas.contracts import UserError
    from nas.library import Chosen, StudyRun, open_run
    from nas.study import Study, load_study

__all__ = ["Chosen", "Study", "StudyRun", "UserError", "load_study", "open_run"]

_ROOMS = {
    "Chosen": "nas.library",
    "Study": "nas.study",
    "StudyRun": "nas.library",
    "UserError": "nas.contracts",
    "load_study": "nas.study",
    "open_run": "nas.library",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for, so that `nas --help` starts in a moment and workers load no more than they need."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)

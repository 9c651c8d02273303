"""Run by every Python that starts with this folder on PYTHONPATH: installs the import hook.

Python runs only the first `sitecustomize` on its path, so this one goes on to the one it hides.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import mmedx_torch_companions

mmedx_torch_companions.install()


def _run_hidden_sitecustomize() -> None:
    here = os.path.dirname(os.path.realpath(__file__))
    folders = [os.path.realpath(entry or os.curdir) for entry in sys.path]
    # Only what comes later: two copies of this file would otherwise call each other for ever.
    first = folders.index(here) if here in folders else -1
    later = [
        entry
        for entry, folder in zip(sys.path[first + 1 :], folders[first + 1 :], strict=True)
        if folder != here
    ]
    spec = PathFinder.find_spec("sitecustomize", later)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_run_hidden_sitecustomize()

"""One file per op or family; each has ``OPS``, a tuple of ``bench.registry.Op``."""

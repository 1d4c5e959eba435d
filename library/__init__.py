"""lorasmith: one loop, one layout map, one reader and writer of weights, for every diffusion family."""

__version__ = "0.1.0"

import logging

# On some CPUs bitsandbytes warns at its import, in every run, that a package of other kernels is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

"""lorasmith: one loop, one layout map, one reader and writer of weights, for every diffusion family."""

__version__ = "0.1.0"

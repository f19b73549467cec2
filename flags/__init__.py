"""Every flag of `train.py`, resolved to one frozen `RunConfig`.

The files `flags/recipes/*.flags` are recipes: `train.py --flagfile=flags/recipes/alexnet_bn_8k.flags`.
"""

from flags.config import RunConfig, define, parse, read

__all__ = ["RunConfig", "define", "parse", "read"]

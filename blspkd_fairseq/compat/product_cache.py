"""A bound on what torch keeps for bfloat16 products on a CPU."""

import os

KEPT = 128
"""Shapes of products; one update has some 40, and the next one others."""


def bound_product_cache() -> None:
    """Lets torch keep what it prepares for 128 shapes of a product, unless the environment says otherwise.

    oneDNN and ideep prepare a program for each shape of a bfloat16 product on a CPU and keep 1,024 of them each, at
    half a megabyte and more. Batches of speech have shapes of their own, so that a training grew by 5 GB in its first
    1,200 updates (torch 2.13). Both read these variables at their first product.
    """
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KEPT))

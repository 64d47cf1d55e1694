"""Attention of one new query a row over a cache of keys and values, as decoding a language model does."""

from rollax.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]

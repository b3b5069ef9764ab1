"""Attention processors for Hugging Face diffusers: linear and multi-query, installed by one line."""

from diffattn._config import config

__version__ = "0.1.0"
__all__ = ["config"]

"""Compile Video-LLM captioners and caption video without PyTorch."""

from ._version import __version__

__all__ = ["__version__"]

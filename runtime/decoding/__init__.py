"""Decoding: options, strategies over the ``Inference`` seam, and the scheduler that runs many captions at once.

``options`` says what was asked, ``scores`` turns logits into a token, ``search`` and ``beam`` are the strategies as
state machines, ``scheduler`` gives them rows of one cache.
"""

from .beam import BeamSearch
from .options import RETROSPECTIVE_TEMPLATE, ContrastKind, Decoding, Settings, Strategy, resolve
from .scheduler import Request, Scheduler, Segment, Ticket
from .scores import LogNormalizer, Token, log_likelihoods
from .search import Search, TokenSearch, Turn, generate

__all__ = [
    "RETROSPECTIVE_TEMPLATE",
    "BeamSearch",
    "ContrastKind",
    "Decoding",
    "LogNormalizer",
    "Request",
    "Scheduler",
    "Search",
    "Segment",
    "Settings",
    "Strategy",
    "Ticket",
    "Token",
    "TokenSearch",
    "Turn",
    "generate",
    "log_likelihoods",
    "resolve",
]

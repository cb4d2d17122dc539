"""Preference pairs in SynPO's four steps over a compiled captioner, without PyTorch.

``items`` are the clips, ``candidates`` the captions of each, ``scorers`` their scores (``judge`` and ``endpoint``: by a
language model), ``pairs`` the file of records that a killed run goes on with, and its reader.
"""

from .candidates import CAUTIOUS, Candidate, Material, Proposal, Proposer, Recipe
from .endpoint import Endpoint
from .items import Item, file_item, scene_items
from .judge import JudgeError
from .pairs import GAP, Pair, PairFile, PairJob, PairTally, choose, read_pairs
from .scorers import MOST, GroundTruth, Judge, ReferenceFree, Scorer, Scores

__all__ = [
    "CAUTIOUS",
    "GAP",
    "MOST",
    "Candidate",
    "Endpoint",
    "GroundTruth",
    "Item",
    "Judge",
    "JudgeError",
    "Material",
    "Pair",
    "PairFile",
    "PairJob",
    "PairTally",
    "Proposal",
    "Proposer",
    "Recipe",
    "ReferenceFree",
    "Scorer",
    "Scores",
    "choose",
    "file_item",
    "read_pairs",
    "scene_items",
]

"""Offline jobs: many inputs into one file of records that survives being killed at any moment.

``inputs`` finds what is to be captioned, ``records`` is the file, ``job`` brings both together with a captioner,
``subtitles`` writes a file of cues beside each clip.
"""

from .inputs import BadLine, Entry, read_inputs
from .job import Job, Tally
from .records import RecordFile, RecordStream, Settings
from .subtitles import SubtitleWriter

__all__ = [
    "BadLine",
    "Entry",
    "Job",
    "RecordFile",
    "RecordStream",
    "Settings",
    "SubtitleWriter",
    "Tally",
    "read_inputs",
]

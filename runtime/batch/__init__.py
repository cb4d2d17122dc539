"""Offline jobs: many inputs into one file of records that survives being killed at any moment.

``inputs`` finds what is to be worked on, ``records`` is the file, ``resumable`` brings both together: what is done is
not done again. ``job`` is such a run with a captioner; ``subtitles`` writes a file of cues beside each clip.
"""

from .inputs import BadLine, Entry, read_inputs
from .job import Job
from .records import RecordFile, RecordStream, Settings
from .resumable import ResumableJob, Tally
from .subtitles import SubtitleWriter

__all__ = [
    "BadLine",
    "Entry",
    "Job",
    "RecordFile",
    "RecordStream",
    "ResumableJob",
    "Settings",
    "SubtitleWriter",
    "Tally",
    "read_inputs",
]

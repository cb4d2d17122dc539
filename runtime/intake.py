"""From what is given to a captioner to the tasks that its decoder works on: reading, encoding, contrasted views.

When a task is made, no encoder is needed any more: where components are staged, the decoder comes after them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OptionError
from .clip import Clip, array_clip, read_clip
from .contrast import Contrast
from .decoding import Decoding
from .encoder import EncodedClip
from .prepared import Arrays, MediaOptions, PreparedClip, Source, viewing_and_arrays
from .reading import Readers
from .residency import Residency
from .task import CaptionTask, Model, contrast_of
from .timing import Stages
from .viewing import Viewing


class Intake:
    """Reads and encodes for one captioner.

    ``readers``: processes that read files, this one when ``None``. ``threads``: of a video's decoder.
    """

    def __init__(self, model: Model, loaded: Residency) -> None:
        self._model, self._loaded = model, loaded
        self._pipeline = model.bundle.manifest.pipeline
        self.readers: Readers | None = None
        self.threads: int | None = None

    def read(self, source: Source | None, viewing: Viewing, arrays: Arrays, stages: Stages) -> Clip:
        """The frames and the sound of a file or of arrays. ``OptionError`` for both, neither, and what is for one."""
        frames, waveform = arrays.get("frames"), arrays.get("waveform")
        if (source is None) != (frames is not None or waveform is not None):
            raise OptionError("give either a file or arrays (frames=, waveform=), not both and not neither")
        times, seconds = arrays.get("frame_times"), arrays.get("seconds")
        if source is not None:
            if times is not None or seconds is not None:
                raise OptionError("frame_times= and seconds= are for arrays: a file says them itself")
            return self.read_file(source, viewing, stages, self.readers)
        if viewing.start is not None or viewing.end is not None:
            raise OptionError("start= and end= are for files, not for arrays")
        heard, rate = waveform if viewing.audio else None, arrays.get("sample_rate")
        times_given = {"frame_times": times, "seconds": seconds}
        return array_clip(frames, heard, rate, self._pipeline, **times_given, duplicates=viewing.duplicates)

    def read_file(self, source: Source, viewing: Viewing, stages: Stages, readers: Readers | None) -> Clip:
        """The frames and the sound of a file, read by ``readers``."""
        read = read_clip if readers is None else readers.read
        return read(source, self._pipeline, viewing, stages, threads=self.threads)

    def prepare(
        self,
        source: Source | PreparedClip | None,
        media: MediaOptions,
        stages: Stages,
        prompt: str | None = None,
        decoding: Decoding | None = None,
        keep_features: bool = False,
    ) -> PreparedClip:
        """A clip, read and encoded. With ``decoding``, what cannot fit is refused before any encoder runs."""
        if isinstance(source, PreparedClip):
            if media:
                raise OptionError(f"the clip is prepared already: {', '.join(media)} cannot change it")
            if source.bundle != self._model.bundle.sha256:
                raise OptionError("the clip was prepared by a captioner of another bundle: prepare it with this one")
            return source
        viewing, arrays = viewing_and_arrays(media)
        clip = self.read(source, viewing, arrays, stages)
        if decoding is not None:
            self._model.check_length(clip, viewing.visual_tokens, prompt, decoding)
        return self._encode(clip, viewing, stages, keep_features)

    def tasks(
        self,
        source: Source | PreparedClip | None,
        media: MediaOptions,
        prompt: str | None,
        decodings: Sequence[Decoding],
        stages: Stages,
        num_results: int = 1,
    ) -> list[CaptionTask]:
        """A task for each of ``decodings``, which have their contrast in common, of one clip."""
        keep = decodings[0].contrast == "temporal"
        prepared = self.prepare(source, media, stages, prompt, decodings[0], keep)
        tasks = self._tasks_of(prepared, prompt, decodings, stages, num_results)
        if prepared is not source:
            # Nobody looks at the frames again.
            prepared.clip.frames = None
        return tasks

    def task_of(
        self, clip: Clip, viewing: Viewing, prompt: str | None, decoding: Decoding, stages: Stages
    ) -> CaptionTask:
        """The task of a clip that was read."""
        self._model.check_length(clip, viewing.visual_tokens, prompt, decoding)
        prepared = self._encode(clip, viewing, stages, decoding.contrast == "temporal")
        (task,) = self._tasks_of(prepared, prompt, [decoding], stages)
        clip.frames = None
        return task

    def _encode(self, clip: Clip, viewing: Viewing, stages: Stages, keep_features: bool) -> PreparedClip:
        self._loaded.make_room()
        encoder, budget = self._model.encoder, viewing.visual_tokens
        encoded = encoder.encode(clip, stages, visual_tokens=budget, keep_features=keep_features)
        return PreparedClip(clip, encoded, self._model.bundle.sha256)

    def _tasks_of(
        self,
        prepared: PreparedClip,
        prompt: str | None,
        decodings: Sequence[Decoding],
        stages: Stages,
        num_results: int = 1,
    ) -> list[CaptionTask]:
        """The tasks, with their contrasted views, each of which is encoded once."""
        views: dict[Contrast, EncodedClip] = {}
        tasks: list[CaptionTask] = []
        for how in decodings:
            view = contrast_of(how, prepared.encoded.mode)
            if view is not None and view not in views:
                self._loaded.make_room()
                views[view] = self._model.encoder.contrast(prepared.clip, prepared.encoded, view, stages)
            other = None if view is None else views[view]
            tasks.append(CaptionTask(self._model, prepared, other, prompt, how, stages, num_results))
        return tasks

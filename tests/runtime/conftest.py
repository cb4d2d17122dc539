"""Clips that the tests of media encode for themselves, and what decoding all of one gives; GPUs that are none."""

from __future__ import annotations

import ctypes
import struct
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from intertitle.errors import MediaError
from intertitle.runtime.cuda import Cuda
from intertitle.runtime.media import open_media
from intertitle.runtime.media.video import ContainerFrameReader


def scaled(frame: av.VideoFrame) -> np.ndarray:
    """RGB as ffmpeg's scale filter without options gives it."""
    graph = av.filter.Graph()
    base = Fraction(1, 1000)
    steps: list[Any] = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)]
    steps += [graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")]
    graph.link_nodes(*steps).configure()
    graph.vpush(frame)
    return graph.vpull().to_ndarray()


class Clips:
    """Media files in a temporary folder."""

    #: Options of x264 for groups of 12 frames with frames that refer to later ones.
    SHORT_GROUPS = {"g": "12", "bf": "3", "sc_threshold": "0"}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def picture(index: int, width: int, height: int) -> np.ndarray:
        """A frame that no other resembles: moving gradients, a moving square and noise."""
        y, x = np.mgrid[0:height, 0:width]
        frame = np.stack([x * 3 + index * 5, y * 2 + index * 7, x + y + index * 3], -1) % 200
        frame += np.random.default_rng(index).integers(0, 40, (height, width, 1))
        frame[(index * 3) % (height - 8) :, (index * 5) % (width - 8) :][:8, :8] = 255
        return frame.astype(np.uint8)

    def encode(
        self,
        name: str = "clip.mp4",
        count: int = 60,
        size: tuple[int, int] = (96, 64),
        codec: str = "libx264",
        pix_fmt: str = "yuv420p",
        options: dict[str, str] | None = None,
        times: Sequence[int] | None = None,
        tone: float = 0.0,
    ) -> Path:
        """A clip at 25 frames a second, or with a pts in milliseconds for each frame.

        ``tone``: so many seconds of 440 Hz in stereo, the right channel half as loud.
        """
        path = self.folder / name
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            sound: Any = container.add_stream("aac", rate=44_100, layout="stereo") if tone else None
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(self.picture(index, *size), format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = index, Fraction(1, 25)
                if times is not None:
                    frame.pts, frame.time_base = times[index], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if tone:
                left = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(44_100 * tone)) / 44_100)
                samples = av.AudioFrame.from_ndarray(np.stack([left, left / 2]).astype(np.float32), "fltp", "stereo")
                samples.sample_rate = 44_100
                container.mux(sound.encode(samples))
                container.mux(sound.encode(None))
        return path

    def remux(
        self, source: Path, name: str, change: Callable[[int, bytes], bytes] | None = None, **options: str
    ) -> Path:
        """The same packets in another file with options of its format; ``change`` sees their numbers and contents."""
        path = self.folder / name
        with av.open(str(source)) as container, av.open(str(path), "w", options=options) as copy:
            stream = copy.add_stream_from_template(container.streams.video[0])
            for number, packet in enumerate(packet for packet in container.demux(video=0) if packet.size):
                changed: Any = av.Packet(change(number, bytes(packet)) if change else bytes(packet))
                changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
                changed.time_base, changed.is_keyframe, changed.stream = packet.time_base, packet.is_keyframe, stream
                copy.mux(changed)
        return path

    def cut(self, source: Path, fraction: float) -> Path:
        """The beginning of a file."""
        path = source.with_name("cut" + source.suffix)
        content = source.read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])
        return path

    def destroy(self, path: Path, numbers: Sequence[int]) -> Path:
        """Overwrite the video packets of these numbers with zeros."""
        with av.open(str(path)) as container:
            places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        content = bytearray(path.read_bytes())
        for number in numbers:
            place, size = places[number]
            assert place is not None
            content[place : place + size] = bytes(size)
        path.write_bytes(content)
        return path

    def set_display_matrix(self, path: Path, a: int, b: int, c: int, d: int) -> Path:
        """Write the matrix of an MP4 track header (ISO 14496-12, 8.3.2): 44 bytes after its name, in 16.16."""
        content = bytearray(path.read_bytes())
        place = content.index(b"tkhd") + 44
        content[place : place + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
        path.write_bytes(content)
        return path

    def image(self, name: str, image: np.ndarray, **options: Any) -> Path:
        """An image file in the format that its name says, by Pillow."""
        path = self.folder / name
        pytest.importorskip("PIL.Image").fromarray(image).save(path, **options)
        return path

    def wave(self, name: str, samples: np.ndarray, rate: int) -> Path:
        """int16 ``[n, channels]`` as a WAV file."""
        path = self.folder / name
        with wave.open(str(path), "wb") as file:
            file.setnchannels(samples.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.astype("<i2").tobytes())
        return path

    @staticmethod
    def decode(path: Path) -> list[np.ndarray]:
        """The reference: every frame in the order in which one thread puts them out, by ffmpeg's scale filter."""
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            return [scaled(frame) for frame in container.decode(stream)]

    def assert_exact(self, path: Path, draws: int = 6) -> None:
        """All frames, and random picks of them, are the reference's, and none had to be looked for a second time."""
        reference = self.decode(path)
        assert len(reference) > 0

        def second_look(*_: object) -> None:
            pytest.fail("frames went missing")

        rng = np.random.default_rng(0)
        with open_media(path) as media, pytest.MonkeyPatch.context() as patch:
            assert media.num_frames == len(reference)
            if media._frames._index is not None:  # type: ignore[union-attr]
                patch.setattr(ContainerFrameReader, "_read_through", second_look)
            np.testing.assert_array_equal(media.read_frames(range(len(reference))), reference)
            for _ in range(draws):
                indices = rng.integers(0, len(reference), rng.integers(1, 17))
                np.testing.assert_array_equal(media.read_frames(indices), [reference[index] for index in indices])
            assert media.notes == []

    @staticmethod
    def refusal(path: Path | str) -> str:
        """The one line with which a source is refused, at the latest when it is read."""
        with pytest.raises(MediaError) as caught, open_media(path) as media:
            media.read_frames([0])
        message = str(caught.value)
        assert message.startswith(str(path))
        assert message.isprintable()
        return message


@pytest.fixture
def clips(tmp_path: Path) -> Clips:
    return Clips(tmp_path)


@dataclass
class Block:
    array: np.ndarray

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def size(self) -> int:
        return self.array.nbytes


class HostDevice:
    """A GPU that is none: ``cuda.Device`` over the process's own memory. ``launches``: of captured work.

    Captured work is what was queued, with the addresses and shapes of that moment, as in a CUDA graph.
    """

    stream, name, capability = 7, "Host", "8.9"

    def __init__(self) -> None:
        self.launches = self.captures = self.allocated = 0
        self._recorded: list[Callable[[], None]] | None = None

    @staticmethod
    def at(address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        """The array at an address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)

    def allocate(self, size: int) -> Block:
        self.allocated += size
        # Not zeros: device memory holds whatever was there.
        return Block(np.full(max(size, 1), 0xFF, np.uint8))

    def pinned(self, shape, dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def queue(self, work: Callable[[], None]) -> None:
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def upload(self, address: int, array: np.ndarray) -> None:
        self.queue(lambda: np.copyto(self.at(address, array.shape, array.dtype), array))

    def download(self, array: np.ndarray, address: int) -> None:
        self.queue(lambda: np.copyto(array, self.at(address, array.shape, array.dtype)))

    def copy(self, target: int, source: int, width: int, height: int, pitch: int) -> None:
        for row in range(height):
            ctypes.memmove(target + row * pitch, source + row * pitch, width)

    def zero(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        self._recorded = recorded = []
        work()
        self._recorded = None

        def launch() -> None:
            self.launches += 1
            for each in recorded:
                each()

        return launch


@pytest.fixture
def host() -> HostDevice:
    return HostDevice()


@pytest.fixture
def agree() -> Callable[..., None]:
    """``agree(mine, theirs, spec, bound)``: two implementations of ``Inference`` of 3 rows of 128 tokens give the same
    logits, up to ``bound`` of the largest, whatever is done to their rows."""

    def check(mine, theirs, spec, bound: float) -> None:
        rng = np.random.default_rng(0)

        def same(do) -> None:
            got, want = do(mine), do(theirs)
            if want is not None:
                assert np.abs(got - want).max() < bound * np.abs(want).max()

        prompts = [rng.standard_normal((size, spec.hidden_size)).astype(np.float32) * 0.1 for size in (40, 17, 5)]
        for row, prompt in enumerate(prompts):
            same(lambda each, row=row, prompt=prompt: each.prefill(row, prompt, num_logits=min(len(prompt), 20)))
        ids = rng.integers(0, spec.vocab_size, (6, 3))
        same(lambda each: each.step(ids[0]))
        same(lambda each: each.step(ids[1][:2]))
        same(lambda each: each.rearrange({0: 1, 1: 0, 2: 1}))
        same(lambda each: each.step(ids[2]))
        same(lambda each: each.truncate(2, 9))
        same(lambda each: each.prefill(2, prompts[2]))
        same(lambda each: each.rearrange({2: 0}, start=0, stop=10))
        same(lambda each: each.step(ids[3]))
        same(lambda each: each.step(ids[4][:1]))
        if spec.positions == "explicit":
            _agree_on_positions(same, prompts, ids)

    return check


def _agree_on_positions(same: Callable[..., None], prompts: list[np.ndarray], ids: np.ndarray) -> None:
    """Positions that are given, and those that follow them, whatever is done to the rows."""
    apart = np.array([30, 31, 31, 50, 33])
    same(lambda each: each.truncate(1, 3))
    same(lambda each: each.prefill(1, prompts[2], 2, positions=apart))
    same(lambda each: each.step(ids[5]))
    same(lambda each: each.rearrange({0: 1}, start=0, stop=6))
    # Row 0 goes on behind 31, row 1 behind 51.
    same(lambda each: each.step(ids[0]))
    same(lambda each: each.prefill(2, prompts[1], 17, positions=np.arange(17) // 3))
    same(lambda each: each.truncate(0, 2))
    same(lambda each: each.step(ids[1]))


@pytest.fixture
def torch_inference() -> Callable[..., Any]:
    """``torch_inference(checkpoint, spec)``: 3 rows of 128 tokens in PyTorch, with the positions of ``spec``."""
    from intertitle.calibration.reference import Reference
    from intertitle.models import CaptionerCheckpoint

    def open_rows(checkpoint: CaptionerCheckpoint, spec: Any) -> Any:
        decoder = replace(checkpoint.config.decoder, positions=spec.positions)
        config = replace(checkpoint.config, decoder=decoder)
        return Reference(CaptionerCheckpoint(checkpoint.checkpoint, config)).open(3, 128)

    return open_rows


SUCCESS = SimpleNamespace(name="cudaSuccess")


class FakeRuntime:
    """``cuda.bindings.runtime`` as far as these tests go; ``given_back`` in order."""

    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaHostAllocDefault = 0

    def __init__(self) -> None:
        self.blocks, self.given_back, self.launched = {}, [], []

    def cudaHostAlloc(self, size, flags):
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return SUCCESS, ctypes.addressof(block)

    def cudaFreeHost(self, address):
        self.given_back.append(self.blocks.pop(address))
        return (SUCCESS,)

    def cudaStreamBeginCapture(self, stream, mode):
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream):
        return SUCCESS, "graph"

    def cudaGraphInstantiate(self, graph, flags):
        return SUCCESS, f"executable of {graph}"

    def cudaGraphDestroy(self, graph):
        self.given_back.append(graph)
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, executable):
        self.given_back.append(executable)
        return (SUCCESS,)

    def cudaGraphLaunch(self, executable, stream):
        self.launched.append(executable)
        return (SUCCESS,)


@pytest.fixture
def gpu() -> Cuda:
    """``Cuda`` over a CUDA runtime that is none."""
    gpu = Cuda.__new__(Cuda)
    gpu._api, gpu.stream = FakeRuntime(), 7
    return gpu

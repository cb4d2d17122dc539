"""Reading the 16 frames that a captioner looks at from a clip of 60 s at 60 frames a second, against decoding it all.

reader     the runtime's: packets read without decoding, then decoding from the keyframes that the wanted frames need
decode_all PyAV on all cores, every frame decoded, only the wanted ones turned into RGB
cv2_read   OpenCV's VideoCapture, ``read()`` of every frame
cv2_grab   OpenCV's VideoCapture, ``grab()`` of every frame (decoded, not turned into RGB), ``retrieve()`` of the wanted

Opening the file counts for all four. The clips are drawn and encoded on the spot: 1280x720 H.264 with B-frames, one
with the groups of 250 frames that x264 makes by default, one with groups of 60.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import click
import cv2
import numpy as np
from av.video.reformatter import Interpolation

from ..runtime.media import open_media
from ..runtime.preprocess.frames import sample_indices
from .harness import alternate, paired_ratio, write_result

WIDTH, HEIGHT = 1280, 720
GROUPS = (250, 60)
PLACES = 16


def render(path: Path, fps: int, seconds: int, group: int) -> None:
    """A textured landscape that drifts past, with grain that changes from frame to frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : HEIGHT + 256, 0 : WIDTH + 2048]
    texture = np.kron(rng.integers(0, 60, ((HEIGHT + 256) // 16, (WIDTH + 2048) // 16)), np.ones((16, 16), np.int64))
    land = (40 + x // 24 % 96 + y // 16 + texture).clip(0, 235).astype(np.uint8)
    colour = (96 + x[: HEIGHT // 2 + 128, : WIDTH // 2 + 1024] // 16 % 64).astype(np.uint8)
    grain = rng.integers(0, 7, (8, HEIGHT, WIDTH), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "23", "g": str(group), "bf": "3"}
        stream: Any = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_type = WIDTH, HEIGHT, "yuv420p", "AUTO"
        planes = np.empty((HEIGHT * 3 // 2, WIDTH), np.uint8)
        for index in range(fps * seconds):
            right, down = index * 4 % 2048, int(64 + 64 * np.sin(index / 40))
            planes[:HEIGHT] = land[down : down + HEIGHT, right : right + WIDTH] + grain[index % 8]
            chroma = colour[down // 2 : (down + HEIGHT) // 2, right // 2 : (right + WIDTH) // 2][: HEIGHT // 2]
            planes[HEIGHT : HEIGHT * 5 // 4] = chroma.reshape(HEIGHT // 4, WIDTH)
            planes[HEIGHT * 5 // 4 :] = 255 - planes[HEIGHT : HEIGHT * 5 // 4]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def by_reader(path: Path) -> np.ndarray:
    """The wanted frames ``[16, H, W, 3]``, as the runtime reads them."""
    with open_media(path) as media:
        return media.read_frames(sample_indices(media.num_frames, PLACES, "centered"))


def by_decoding_all(path: Path, wanted: set[int]) -> np.ndarray:
    """The same by PyAV, decoding everything."""
    kept = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                kept.append(frame.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC))
    return np.stack(kept)


def by_opencv(path: Path, wanted: set[int], grab: bool) -> np.ndarray:
    """The same by OpenCV."""
    kept = []
    capture = cv2.VideoCapture(str(path))
    index = 0
    while True:
        frame = None
        if grab:
            found = capture.grab()
            if found and index in wanted:
                _, frame = capture.retrieve()
        else:
            found, frame = capture.read()
        if not found:
            break
        if index in wanted and frame is not None:
            kept.append(frame[:, :, ::-1])
        index += 1
    capture.release()
    return np.stack(kept)


def measure(path: Path, rounds: int) -> dict[str, object]:
    """Seconds of each way, and how many times longer the others take than the reader."""
    with open_media(path) as media:
        total = media.num_frames
    wanted = set(sample_indices(total, PLACES, "centered").tolist())
    ways: dict[str, Callable[[], np.ndarray]] = {
        "reader": lambda: by_reader(path),
        "decode_all": lambda: by_decoding_all(path, wanted),
        "cv2_read": lambda: by_opencv(path, wanted, grab=False),
        "cv2_grab": lambda: by_opencv(path, wanted, grab=True),
    }
    np.testing.assert_array_equal(ways["reader"](), ways["decode_all"]())

    processor: dict[str, list[float]] = {name: [] for name in ways}

    def timed(name: str, way: Callable[[], np.ndarray]) -> Callable[[], float]:
        def run() -> float:
            started, worked = time.perf_counter(), time.process_time()
            frames = way()
            seconds = time.perf_counter() - started
            processor[name].append(time.process_time() - worked)
            assert len(frames) == PLACES
            return seconds

        return run

    seconds = alternate({name: timed(name, way) for name, way in ways.items()}, rounds)
    return {
        "frames": total,
        "file_bytes": path.stat().st_size,
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        # Of all threads; the machine's other load changes it less than it does the seconds that pass.
        "median_processor_seconds": {
            name: round(statistics.median(values[-rounds:]), 3) for name, values in processor.items()
        },
        "times_faster_than": {
            name: paired_ratio(values, seconds["reader"]) for name, values in seconds.items() if name != "reader"
        },
        "seconds": seconds,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Rounds of each measurement.")
@click.option("--seconds", default=60, show_default=True, help="Length of the clips.")
@click.option("--fps", default=60, show_default=True, help="Frames per second of the clips.")
@click.option("-o", "--result", default="frames", show_default=True, help="The name of the file in results/.")
def main(rounds: int, seconds: int, fps: int, result: str) -> None:
    """Measure seconds to the 16 frames of a clip."""
    figures: dict[str, object] = {
        "clip": f"{WIDTH}x{HEIGHT} H.264, {fps} frames a second, {seconds} s, 3 B-frames",
        "places": PLACES,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUPS:
            path = Path(folder) / f"group-{group}.mp4"
            render(path, fps, seconds, group)
            figures[f"group_of_{group}"] = measured = measure(path, rounds)
            for name in ("median_seconds", "median_processor_seconds", "times_faster_than"):
                click.echo(f"groups of {group}, {name}: {measured[name]}")
    click.echo(write_result(result, figures, "python -m intertitle.benchmarks.frames"))


if __name__ == "__main__":
    main()

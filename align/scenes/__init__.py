"""Four seconds of known content: a seeded scene, its frames, sound, captions and facts, and what a text says of it.

scene = draw_scene("train", 0)
frames, sound = render_frames(scene, times, 96), render_sound(scene, 16000)
references, truth = captions(scene), facts(scene)
compare(scene, text).invented
"""

from .draw import FPS, NUM_FRAMES, SECONDS, render_frames, write_clip
from .facts import Comparison, Fact, compare, facts
from .language import captions
from .lexicon import WORDS
from .scene import SPLITS, Background, Heard, Scene, Thing, draw_scene, split_of
from .sounds import render_sound

__all__ = [
    "FPS",
    "NUM_FRAMES",
    "SECONDS",
    "SPLITS",
    "WORDS",
    "Background",
    "Comparison",
    "Fact",
    "Heard",
    "Scene",
    "Thing",
    "captions",
    "compare",
    "draw_scene",
    "facts",
    "render_frames",
    "render_sound",
    "split_of",
    "write_clip",
]

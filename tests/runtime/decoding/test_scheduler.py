"""Many captions on one cache: each is what it is alone, whatever else is under way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intertitle.errors import OptionError
from intertitle.runtime.decoding import BeamSearch, Request, Scheduler, Segment, Settings, TokenSearch

from .conftest import Oracle

HEADS = ([1.5], [2.5, 3.5])
CLIPS = ([10.5, 11.5, 12.5], [20.5], [10.5, 11.5, 13.5])
TAILS = ([30.5, 31.5], [40.5])


def segments(head: int, clip: int, tail: int) -> list[Segment]:
    return [Segment(np.array(part, np.float32)[:, None]) for part in (HEADS[head], CLIPS[clip], TAILS[tail])]


class Job:
    """A caption to be made, from a drawn description; ``request`` starts it afresh."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def request(self) -> tuple[Request, list[int]]:
        spec, heard = self.spec, []
        how = Settings(
            strategy=spec["strategy"],
            max_new_tokens=spec["limit"],
            num_beams=spec["beams"],
            repetition_penalty=1.3,
            no_repeat_ngram=3,
            eos_token_ids=(0, 5),
            seed=spec["seed"],
            contrast=(0.5, None) if spec["contrast"] and spec["strategy"] != "beam" else None,
        )
        search = BeamSearch(how) if spec["strategy"] == "beam" else TokenSearch(how)
        prompts = [segments(*spec["prompt"])] + ([segments(*spec["other"])] if search.streams == 2 else [])
        forced = spec["forced"]

        def accept(token) -> bool:
            heard.append(token.id)
            return token.id == spec["stop"]

        embeds = np.array(forced, np.float32)[:, None] if forced else None
        return Request(prompts, search, accept, forced, embeds), heard

    def alone(self) -> list[int]:
        request, heard = self.request()
        scheduler = Scheduler(Oracle(request.search.rows, 64))
        ticket = scheduler.admit(request)
        while not ticket.done:
            scheduler.step()
        return heard


PROMPT = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 1))
JOBS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["greedy", "sample", "beam"]),
        "limit": st.integers(1, 9),
        "beams": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "contrast": st.booleans(),
        "prompt": PROMPT,
        "other": PROMPT,
        "forced": st.lists(st.integers(1, 4), max_size=2),
        "stop": st.sampled_from([-1, 3, 7]),
    }
).map(Job)


@settings(max_examples=120, deadline=None)
@given(st.lists(JOBS, min_size=1, max_size=8), st.integers(3, 7), st.lists(st.integers(0, 3), max_size=30))
def test_every_caption_is_what_it_is_alone(jobs, rows, steps_between):
    """Any mix of strategies and lengths, any order of arrival: the tokens of each are those it has by itself."""
    scheduler, waits = Scheduler(Oracle(rows, 64)), iter(steps_between)
    running: list = []
    results: list[list[int]] = []
    for job in jobs:
        request, heard = job.request()
        for _ in range(next(waits, 0)):
            if not scheduler.idle:
                scheduler.step()
        while scheduler.free_rows < request.search.rows:
            scheduler.step()
        running.append(scheduler.admit(request))
        results.append(heard)
    while not scheduler.idle:
        scheduler.step()
    assert all(ticket.done for ticket in running)
    assert scheduler.free_rows == rows
    assert results == [job.alone() for job in jobs]


@settings(max_examples=60, deadline=None)
@given(st.lists(JOBS, min_size=2, max_size=6), st.data())
def test_cancelling_one_changes_no_other(jobs, data):
    rows = sum(job.request()[0].search.rows for job in jobs)
    scheduler = Scheduler(Oracle(rows, 64))
    started = [(job, *job.request()) for job in jobs]
    tickets = [scheduler.admit(request) for _, request, _ in started]
    victim = data.draw(st.integers(0, len(jobs) - 1))
    for _ in range(data.draw(st.integers(0, 3))):
        if not scheduler.idle:
            scheduler.step()
    before = scheduler.free_rows
    was_done = tickets[victim].done
    scheduler.cancel(tickets[victim])
    assert scheduler.free_rows == before + (0 if was_done else started[victim][1].search.rows)
    while not scheduler.idle:
        scheduler.step()
    for index, (job, _, heard) in enumerate(started):
        whole = job.alone()
        assert heard == (whole if index != victim else whole[: len(heard)])


def greedy(prompt: tuple[int, int, int], limit: int = 3) -> Request:
    how = Settings(max_new_tokens=limit, eos_token_ids=())
    return Request([segments(*prompt)], TokenSearch(how), lambda token: False)


def run(scheduler: Scheduler, request: Request) -> int:
    """The prompt tokens that had to be computed."""
    before = scheduler.inference.computed  # type: ignore[attr-defined]
    ticket = scheduler.admit(request)
    while not ticket.done:
        scheduler.step()
    return scheduler.inference.computed - before  # type: ignore[attr-defined]


def test_what_prompts_have_in_common_is_computed_once():
    scheduler = Scheduler(Oracle(1, 64))
    assert run(scheduler, greedy((1, 0, 0))) == 2 + 3 + 2
    # The same clip with another question: only the question.
    assert run(scheduler, greedy((1, 0, 1))) == 1
    # Another clip: the text before it stays.
    assert run(scheduler, greedy((1, 1, 0))) == 1 + 2
    # The same prompt: nothing.
    assert run(scheduler, greedy((1, 1, 0))) == 0


def test_a_prefix_is_copied_from_a_row_in_use():
    scheduler = Scheduler(Oracle(3, 64))
    scheduler.admit(greedy((1, 0, 0), limit=30))
    before = scheduler.inference.computed  # type: ignore[attr-defined]
    scheduler.admit(greedy((1, 0, 1), limit=30))
    scheduler.admit(greedy((1, 0, 0), limit=30))
    assert scheduler.inference.computed - before == 1  # type: ignore[attr-defined]


def test_a_step_takes_in_the_rows_in_use_and_no_others():
    scheduler = Scheduler(Oracle(4, 64))
    tickets = [scheduler.admit(greedy((0, clip % 3, 0), limit=20)) for clip in range(4)]
    scheduler.step()
    scheduler.cancel(tickets[0])
    scheduler.cancel(tickets[2])
    scheduler.step()
    assert scheduler.inference.steps == [4, 2]  # type: ignore[attr-defined]
    scheduler.admit(greedy((0, 1, 0), limit=20))
    scheduler.step()
    assert scheduler.inference.steps == [4, 2, 3]  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_and_takes_nothing():
    scheduler = Scheduler(Oracle(2, 7))
    long = Request([[Segment(np.ones((8, 1), np.float32))]], greedy((0, 0, 0)).search, lambda token: False)
    with pytest.raises(OptionError, match="8 tokens"):
        scheduler.admit(long)
    beam = BeamSearch(Settings(strategy="beam", num_beams=3, max_new_tokens=2, eos_token_ids=()))
    with pytest.raises(OptionError, match="3 rows"):
        scheduler.admit(Request([segments(0, 0, 0)], beam, lambda token: False))
    assert scheduler.free_rows == 2
    assert scheduler.idle

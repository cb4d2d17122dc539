"""Beam search against transformers' own, over a small random Llama."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from intertitle.runtime.decoding import BeamSearch, Settings, generate
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import Oracle

EOS = 3


class Llama(Oracle):
    """The same interface over a transformers model, without a cache: ids in, logits of the last position out."""

    def __init__(self, model: LlamaForCausalLM, rows: int) -> None:
        super().__init__(rows, 64)
        self._model = model

    def logits(self, history: list[float]) -> np.ndarray:
        with torch.no_grad():
            return self._model(torch.tensor([history], dtype=torch.int64)).logits[0, -1].numpy()


@pytest.fixture(scope="module")
def models() -> list[LlamaForCausalLM]:
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        made.append(LlamaForCausalLM(config).eval())
    return made


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beams_equal_transformers(models, beams, length_penalty):
    prompts = ([5, 6, 7], [9], [11, 4])
    ended_early = 0
    for model, prompt in itertools.product(models, prompts):
        inference = Llama(model, beams)
        logits = inference.prefill(0, np.array(prompt, np.float32)[:, None])[0]
        how = Settings(
            strategy="beam",
            num_beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=10,
            eos_token_ids=(EOS,),
        )
        search = BeamSearch(how, num_results=beams)
        mine = [token.id for token in generate(inference, logits, search)]
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=beams,
                num_return_sequences=beams,
                do_sample=False,
                max_new_tokens=10,
                length_penalty=length_penalty,
            )
        expected = [row[len(prompt) :].tolist() for row in theirs]
        expected = [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in expected]
        if beams == 1:
            # One beam is greedy decoding, which transformers runs without a beam search.
            assert mine == expected[0]
            continue
        assert mine == expected[0]
        assert [[token.id for token in result] for result in search.results] == expected
        ended_early += mine[-1] == EOS
    assert beams == 1 or length_penalty > 1 or ended_early > 0


def test_likelihoods_are_the_models_own(models):
    inference = Llama(models[0], 3)
    first = inference.prefill(0, np.array([[5.0], [6.0]], np.float32))[0]
    how = Settings(strategy="beam", num_beams=3, max_new_tokens=6, repetition_penalty=1.5, eos_token_ids=(EOS,))
    tokens = list(generate(inference, first, BeamSearch(how)))
    ids = torch.tensor([[5, 6, *(token.id for token in tokens)]])
    with torch.no_grad():
        logprobs = torch.log_softmax(models[0](ids).logits[0], -1)
    theirs = [float(logprobs[1 + i, token.id]) for i, token in enumerate(tokens)]
    np.testing.assert_allclose([token.logprob for token in tokens], theirs, atol=1e-5)


def test_a_stop_ends_a_hypothesis(models):
    how = Settings(strategy="beam", num_beams=2, max_new_tokens=10, eos_token_ids=())
    inference = Llama(models[1], 2)
    first = inference.prefill(0, np.array([[5.0]], np.float32))[0]
    free = [token.id for token in generate(inference, first.copy(), BeamSearch(how))]
    assert len(free) == 10
    inference = Llama(models[1], 2)
    first = inference.prefill(0, np.array([[5.0]], np.float32))[0]
    stopped = [t.id for t in generate(inference, first, BeamSearch(how, ends=lambda ids: len(ids) == 4))]
    assert len(stopped) == 4

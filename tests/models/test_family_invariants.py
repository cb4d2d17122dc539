"""What holds for every family: tests that a new one gets for its line in the registry and its fixture.

A fixture is a folder of ``tests/data`` with a checkpoint in the released layout. ``docs/add-a-family.md`` tells how one
is made.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from intertitle.calibration.recipe import component_rules
from intertitle.contract.pipeline import PIXELS, SOUND, TIMED, VARIABLES, EachOf, Ids, Piece, Pipeline, stages_of
from intertitle.contract.targets import TARGETS
from intertitle.export.components import captioner_parts, lower
from intertitle.export.dialects.forms import DIALECTS, form_of
from intertitle.export.targets import matmul_dtype
from intertitle.export.tokenizer import collect_tokenizer
from intertitle.models import FAMILIES, attention, open_checkpoint
from intertitle.models.captioner import CaptionerCheckpoint
from intertitle.models.checkpoint import Checkpoint
from intertitle.models.decoder import Decoder
from intertitle.models.families import find_family
from intertitle.models.save import save_checkpoint
from intertitle.models.stages import measured
from intertitle.runtime.prompt import build_prompt, speaks_of_time, texts_of
from torch import nn

DATA = Path(__file__).parents[1] / "data"
FIXTURES = sorted(path.parent.name for path in DATA.glob("*/config.json") if [*path.parent.glob("model*.safetensors")])
_BRACES = re.compile(r"\{([^{}]*)\}")


@pytest.fixture(params=FIXTURES)
def checkpoint(request, opened) -> CaptionerCheckpoint:
    return opened(request.param)


def layouts(pipeline: Pipeline) -> list[tuple[Piece, ...]]:
    """The pieces of all prompts, those for clips without times among them."""
    found = [pieces for layout in pipeline.prompts.values() for pieces in (layout.pieces, layout.untimed)]
    return [pieces for pieces in found if pieces]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_files_and_a_fixture(family, repo_dir):
    folder = repo_dir / "models" / family
    assert {"__init__.py", "config.py", "weights.py", "prompt.py", "sizes.py"} <= {
        path.name for path in folder.iterdir()
    }
    checkpoints = [Checkpoint.open(DATA / name) for name in FIXTURES]
    assert [one for one in checkpoints if find_family(one) is FAMILIES[family]]


def test_one_family_matches_and_its_config_says_its_name(checkpoint):
    matching = [name for name, family in FAMILIES.items() if family.matches(checkpoint.checkpoint)]
    assert matching == [checkpoint.config.family]


def test_stages_are_connected(checkpoint):
    """Each takes what is there before it, and what it gives is used."""
    pipeline = checkpoint.config.pipeline
    assert (pipeline.sound is not None) == any(value.source == SOUND for s in pipeline.stages for value in s.inputs)
    known, used = {PIXELS, SOUND}, {name for pieces in layouts(pipeline) for name in stages_of(pieces)}
    for stage in pipeline.stages:
        assert stage.name not in known
        assert {value.source for value in stage.inputs} <= known
        assert len({value.name for value in stage.inputs}) == len(stage.inputs)
        used |= {value.source for value in stage.inputs}
        known.add(stage.name)
    assert used == known - ({SOUND} if pipeline.sound is None else set())
    assert checkpoint.components == (*(stage.name for stage in pipeline.stages), "decoder")
    assert pipeline.sampling.count >= pipeline.least_places()


def test_prompts_name_stages_and_variables_that_are_there(checkpoint):
    config = checkpoint.config
    pipeline, rows = config.pipeline, checkpoint.embedding().shape[0]
    wanted = {"video"} if pipeline.sound is None else {"video", "audio", "audiovideo"}
    assert set(pipeline.prompts) == wanted
    seen = {stage.name for stage in pipeline.visual()}
    for mode, layout in pipeline.prompts.items():
        assert bool(layout.untimed) == speaks_of_time(layout.pieces)
        assert not speaks_of_time(layout.untimed)
        for pieces in filter(None, (layout.pieces, layout.untimed)):
            named = stages_of(pieces)
            assert named
            assert len(named) == len(set(named))
            assert bool(seen & set(named)) == (mode != "audio")
            assert bool(set(named) - seen) == (mode != "video")
            assert sum(text.count("{instruction}") for text in texts_of(pieces)) == 1
            for piece in pieces:
                each = [piece.before, piece.after, piece.separator] if isinstance(piece, EachOf) else texts_of([piece])
                allowed = {*VARIABLES} - (set() if isinstance(piece, EachOf) else {"index"})
                assert {name for text in each for name in _BRACES.findall(text)} <= allowed
                assert not isinstance(piece, Ids) or all(i < rows for i in piece.ids)
    assert {*TIMED} <= {*VARIABLES}


def test_a_whole_prompt_fits_the_context(checkpoint):
    """The prompt of a clip with all its places, and a caption of 512 tokens."""
    config, pipeline = checkpoint.config, measured(checkpoint.config)
    tokenizer, places = collect_tokenizer(checkpoint.path), checkpoint.config.sampling.count
    units = {stage.name: pipeline.units(stage.name, places) for stage in pipeline.stages}
    for pieces in layouts(pipeline):
        if speaks_of_time(pieces):
            continue
        length = 0
        for piece in build_prompt(tokenizer, pieces, config.default_instruction, units, places=places):
            if isinstance(piece, list):
                length += len(piece)
            else:
                length += pipeline.tokens(piece.stage) * (1 if piece.unit is not None else units[piece.stage])
        assert length + 512 <= config.decoder.context_length


def test_tokens_have_rows_and_the_end_is_one_of_them(checkpoint):
    tokenizer, config = collect_tokenizer(checkpoint.path), checkpoint.config
    assert max(tokenizer.get_vocab().values()) < config.decoder.vocab_size
    assert all(tokenizer.id_to_token(i) is not None for i in config.generation.eos_token_ids)


def test_random_weights_are_saved_and_read_again_under_the_released_names(checkpoint, tmp_path):
    """Every entry of every component comes back, also of those that share a tensor of the file."""
    random = torch.Generator().manual_seed(0)
    state = {
        name: {entry: torch.randn(value.shape, generator=random) for entry, value in module.state_dict().items()}
        for name, module in ((name, checkpoint.module(name)) for name in checkpoint.components)
    }
    state["embedding"] = {"weight": torch.randn(checkpoint.embedding().shape, generator=random)}
    if checkpoint.config.decoder.tie_embeddings:
        state["embedding"]["weight"] = state["decoder"]["lm_head.weight"]
    again = open_checkpoint(save_checkpoint(checkpoint, state, tmp_path / "saved", torch.float32))
    assert set(again.checkpoint.tensors) == set(checkpoint.checkpoint.tensors)
    for component, entries in state.items():
        for entry, value in entries.items():
            read = again.embedding() if component == "embedding" else again.tensor(component, entry)
            torch.testing.assert_close(read, value, rtol=1e-5, atol=1e-6, msg=f"{component}: {entry}")


def test_the_file_s_own_tensors_come_back(checkpoint):
    """As they are, or in another split that is read as the same: a gain folded into its direction, a vocabulary cut."""
    same, other = 0, set()
    for component in checkpoint.components:
        entries = {entry: checkpoint.tensor(component, entry) for entry in checkpoint.module(component).state_dict()}
        for name, tensor in checkpoint.to_checkpoint(component, entries).items():
            found = checkpoint.checkpoint.tensor(name)
            assert tensor.shape == found.shape, name
            if torch.equal(tensor.float(), found.float()):
                same += 1
            else:
                other.add(re.sub(r"\d+", "N", name.rpartition("audio_tower.")[2]))
    assert same > 20
    assert other <= {
        "lm_head.weight",
        "encoder.pos_conv.N.weight_g",
        "encoder.pos_conv.N.weight_v",
        *(f"encoder.layers.N.self_attn.grep_linear.{part}" for part in ("weight", "bias")),
    }


def filled(module: nn.Module) -> nn.Module:
    """Zeros in place of the tensors without memory; what is computed (rotary tables, buckets) stays."""
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is not None and value.is_meta:
                    zeros = torch.zeros(value.shape, dtype=value.dtype)
                    table[name] = nn.Parameter(zeros, False) if isinstance(value, nn.Parameter) else zeros
    return module


@pytest.mark.parametrize("target", TARGETS)
def test_every_dialect_lowers_every_component_in_every_format(checkpoint, target):
    """What ``compile`` traces can be called as it says, and gives the shapes of the module itself. Values are none: the
    operators of ONNX do not compute here."""
    record, config = TARGETS[target], checkpoint.config
    pipeline, dialect = measured(config), DIALECTS[record.dialect]
    for weights in dict.fromkeys((*record.decoder_formats, *record.encoder_formats)):
        for part in captioner_parts(checkpoint, pipeline, matmul_dtype(record, weights)):
            taken = record.decoder_formats if part.name == "decoder" else record.encoder_formats
            if weights not in taken:
                continue
            recipe = component_rules(part.name, part.module, record, weights)
            form = form_of(part.module, part.name, recipe, matmul_dtype(record, weights))
            lowered = filled(lower(part.module, dialect.replacements(form)))
            with attention.use(dialect.attention(form.dtype)):
                if isinstance(lowered, Decoder):
                    *values, past = part.signature.arguments
                    # The first tokens of each row: the last of them stands at the place of the length, less one.
                    values[1] = values[1] + values[0].shape[1] - 1
                    values[2] = values[2] + values[0].shape[1]
                    logits, present = lowered(*values, list(zip(past[0::2], past[1::2], strict=True)))
                    assert logits.shape == (*values[3].shape, config.decoder.vocab_size)
                    assert [side.shape for pair in present for side in pair] == [side.shape for side in past]
                else:
                    out = lowered(*part.signature.arguments)
                    assert out.ndim == 3
                    assert out.shape[1] in pipeline.token_counts(part.name)

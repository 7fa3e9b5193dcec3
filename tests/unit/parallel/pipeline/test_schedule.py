"""What a pipeline takes to travel between stages is what the model passes on, whatever is frozen."""

from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import PaLIConfig
from model.pali import PaLI, build, plan_on_meta
from parallel.config import ParallelConfig
from parallel.engine.base import Engine
from parallel.pipeline.decoder import PipelineDecoder
from parallel.pipeline.schedule import CarryPlan, CarrySizes
from tests.distributed.problem import MODEL, MT5, PALI, VIT, micro_batches

# Of all parameters: those trained. What is passed on needs gradients from the first trained one on.
TRAINED = [
    ["*"],
    ["bridge.embedding.*", "bridge.*_bias.*", "encoder*", "decoder*", "head.*"],  # a frozen ViT
    ["patches.*", "vit_block_*", "bridge.*", "encoder*"],  # a frozen decoder
    ["patches.*", "vit_block_*", "bridge.vit_norm.*", "bridge.projection.*"],  # a ViT below frozen language
    ["vit_block_1.*"],
    ["bridge.vit_norm.weight"],
    ["bridge.projection.bias"],
    ["bridge.embedding.weight"],
    ["bridge.encoder_bias.weight"],
    ["bridge.decoder_bias.weight"],
    ["encoder_block_1.mlp_in.weight"],
    ["encoder_norm.*"],
    ["decoder_block_0.cross_query.*"],
    ["decoder_block_1.*"],
    ["head.*"],
]


def freeze_all_but(pali: PaLI, patterns: list[str]) -> None:
    for name, parameter in pali.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def travel_of(patterns: list[str], **parallel: Any) -> CarryPlan:
    planned = plan_on_meta(PaLIConfig(VIT, MT5, MODEL))
    freeze_all_but(planned, patterns)
    return CarryPlan(planned, ParallelConfig(**parallel))


@pytest.mark.parametrize("patterns", TRAINED, ids=lambda patterns: patterns[0])
def test_shapes_and_gradients_are_the_models(patterns: list[str]) -> None:
    pali, batch = build(PALI), micro_batches(0)[0]
    freeze_all_but(pali, patterns)
    travel, carry = travel_of(patterns), ()
    for name, unit in pali.units():
        carry = pali.run(unit, carry, batch)
        found = travel.after(name, CarrySizes.from_batch(batch), torch.float32)
        if name != "head":  # nothing travels on from there
            assert [(x.shape, x.requires_grad) for x in found] == [(x.shape, x.requires_grad) for x in carry], name
        assert [(x.dtype, x.is_meta) for x in found] == [(torch.float32, True)] * len(found)


def test_an_engine_decodes_over_its_pipeline_if_it_has_one() -> None:
    pipeline: Any = SimpleNamespace(model=build(PALI), layout=SimpleNamespace(pipeline_group="group"))
    batch = micro_batches(0)[0]
    decoder = Engine._decoder(SimpleNamespace(pipeline=pipeline), batch)  # type: ignore[arg-type]
    assert isinstance(decoder, PipelineDecoder) and (decoder.pipeline, decoder.group) == (pipeline, "group")
    assert Engine._decoder(SimpleNamespace(pipeline=None), batch) is None  # type: ignore[arg-type]


def test_the_head_gives_a_loss_and_totals() -> None:
    loss, totals = CarryPlan(plan_on_meta(PaLIConfig(VIT, MT5, MODEL)), ParallelConfig()).after(
        "head", CarrySizes(2, 3, 16, 8), torch.bfloat16
    )
    assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float32, True)
    assert (totals.shape, totals.dtype, totals.requires_grad) == ((4, 1), torch.float32, False)


def test_nothing_arrives_at_the_first_stage() -> None:
    assert travel_of(["*"]).after(None, CarrySizes(2, 3, 16, 8), torch.float32) == ()


def test_shapes_under_tensor_and_sequence_parallelism() -> None:
    """Four visual tokens and lengths of 18 and 8 over two ranks; each has half of the heads' biases."""
    sizes = CarrySizes(images=5, rows=3, encoder_length=18, decoder_length=8)
    travel = travel_of(["*"], tensor=2, sequence=True)
    tables = [(2, 257), (2, 257)]  # distances of -128 to 128: further ones have the bias of the ends
    for whole, split in ((True, 1), (False, 2)):
        vision, language = (
            [tuple(x.shape) for x in travel.after(name, sizes, torch.float32, whole_sequences=whole)]
            for name in ("vit_block_0", "encoder_norm")
        )
        assert vision == [(4 // split, 5, 64)]
        assert language == [(18 // split, 3, 128), (8 // split, 3, 128), *tables]
    for length, distances in ((128, 257), (130, 271)):
        long = travel.after("bridge", CarrySizes(5, 3, 18, length), torch.bfloat16)
        assert (long[3].shape, long[3].dtype) == ((2, distances), torch.float32)
    travel.vision_tokens = 9
    assert travel.after("patches", sizes, torch.float32)[0].shape[0] == 5, "padded"

"""Same weights, same inputs: outputs, losses and every gradient agree with transformers to 1e-5 relative, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MT5Config as HFMT5Config
from transformers import (
    MT5ForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.generation import generate
from model.pali import PaLI
from model.weights import load, logical_tensors
from model.weights.mt5 import mt5_table
from model.weights.siglip import siglip_table
from model.weights.table import Table, export_tensors, import_tensors
from tests.unit.model.examples import (
    MODEL,
    MT5,
    TOKENS_PER_IMAGE,
    VIT,
    Example,
    example,
    gradients,
    largest_error,
    micro_batch,
    relative_error,
    small_model,
)

TOLERANCE = 1e-5


@pytest.fixture
def mt5() -> MT5ForConditionalGeneration:
    torch.manual_seed(0)
    model = MT5ForConditionalGeneration(
        HFMT5Config(
            d_model=MT5.d_model,
            d_ff=MT5.d_ff,
            d_kv=MT5.d_kv,
            num_heads=MT5.num_heads,
            num_layers=MT5.num_encoder_layers,
            num_decoder_layers=MT5.num_decoder_layers,
            vocab_size=MT5.vocab_size,
            dropout_rate=0.0,
            attn_implementation="eager",
        )
    )
    # transformers 5 ties the output matrix to the embedding; mT5's own is a matrix of its own.
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) * 0.3)
    _roughen(model)
    return model


@pytest.fixture
def siglip() -> SiglipVisionModel:
    torch.manual_seed(1)
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=VIT.width,
            intermediate_size=VIT.mlp_dim,
            num_hidden_layers=VIT.depth,
            num_attention_heads=VIT.num_heads,
            image_size=MODEL.image_size,
            patch_size=VIT.patch_size,
            vision_use_head=False,
            attn_implementation="eager",
        )
    )
    _roughen(model)
    return model


def _roughen(model: nn.Module) -> None:
    """Norms away from one and biases away from zero, so that none of them can go unnoticed."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)


def _ours(*towers: nn.Module) -> PaLI:
    pali = small_model()
    for tower in towers:
        table = mt5_table(MT5) if isinstance(tower, MT5ForConditionalGeneration) else siglip_table(VIT)
        load(pali, import_tensors(tower.state_dict(), table))
    return pali


def _gradients_of(tower: nn.Module, table: Table) -> dict[str, Tensor]:
    return import_tensors({name: p.grad for name, p in tower.named_parameters()}, table)


def _text(rows: list[Example]) -> dict[str, Tensor]:
    """The same examples as transformers wants them: right-padded ids and mask, labels with -100."""
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(e.inputs) for e in rows], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [torch.tensor([*e.targets, 1]) for e in rows], batch_first=True, padding_value=-100
    )
    return {"input_ids": inputs, "attention_mask": (inputs > 0).long(), "labels": labels}


def test_mt5_logits_loss_and_every_gradient(mt5: MT5ForConditionalGeneration) -> None:
    rows = [example(1, 0, 7, 5), example(2, 0, 3, 9), example(3, 0, 12, 2)]
    theirs = mt5(**_text(rows))
    theirs.loss.backward()
    expected = _gradients_of(mt5, mt5_table(MT5))

    pali = _ours(mt5)
    batch = micro_batch([[e] for e in rows])
    units = dict(pali.units())
    carry: tuple[Tensor, ...] = ()
    for name, unit in units.items():
        if name != "head":
            carry = unit(carry, batch)
    head = units["head"]
    (logits,) = head.output(head.norm(carry[1]))
    present = batch.decoder_segments > 0
    assert relative_error(logits.transpose(0, 1)[present], theirs.logits[present]) < TOLERANCE

    loss = pali((), batch, loss_scale=1 / batch.num_targets).loss
    loss.backward()
    assert relative_error(loss, theirs.loss) < TOLERANCE
    ours = {name: g for name, g in gradients(pali).items() if name in expected}
    assert largest_error(ours, expected) < (TOLERANCE,)


def test_vit_features_and_every_gradient(siglip: SiglipVisionModel) -> None:
    batch = micro_batch([[example(1)], [example(2)]])
    pixels = (batch.images.float() / 127.5 - 1).permute(0, 3, 1, 2)
    upstream = torch.randn(2, TOKENS_PER_IMAGE, VIT.width, generator=torch.Generator().manual_seed(3))
    theirs = siglip(pixels).last_hidden_state
    theirs.backward(upstream)
    expected = _gradients_of(siglip, siglip_table(VIT))

    pali = _ours(siglip)
    carry: tuple[Tensor, ...] = ()
    for name, unit in pali.units():
        if name == "bridge":
            break
        carry = unit(carry, batch)
    features = pali.bridge.vit_norm(carry[0]).transpose(0, 1)
    assert relative_error(features, theirs) < TOLERANCE
    features.backward(upstream)
    ours = gradients(pali)
    assert ours.keys() == expected.keys()
    assert largest_error(ours, expected) < (TOLERANCE,)


def test_whole_model_loss_and_every_gradient(mt5: MT5ForConditionalGeneration, siglip: SiglipVisionModel) -> None:
    """Visual tokens first, then text: siglip -> linear -> inputs_embeds, against PaLI; texts of two lengths."""
    rows = [example(1, 1, 7, 5), example(2, 1, 3, 9)]
    pali = _ours(mt5, siglip)
    batch = micro_batch([[e] for e in rows])
    loss = pali((), batch, loss_scale=1 / batch.num_targets).loss
    loss.backward()

    projection = nn.Linear(VIT.width, MT5.d_model)
    projection.load_state_dict(pali.bridge.projection.state_dict())
    text = _text(rows)
    visual = projection(siglip((batch.images.float() / 127.5 - 1).permute(0, 3, 1, 2)).last_hidden_state)
    embeddings = torch.cat([visual, mt5.shared(text["input_ids"])], dim=1)
    mask = F.pad(text["attention_mask"], (TOKENS_PER_IMAGE, 0), value=1)
    theirs = mt5(inputs_embeds=embeddings, attention_mask=mask, labels=text["labels"])
    theirs.loss.backward()
    expected = _gradients_of(mt5, mt5_table(MT5)) | _gradients_of(siglip, siglip_table(VIT))
    expected |= {f"bridge.projection.{name}": p.grad for name, p in projection.named_parameters()}

    assert relative_error(loss, theirs.loss) < TOLERANCE
    assert largest_error(gradients(pali), expected) < (TOLERANCE,)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("beams", "penalty"), [(1, 0.0), (4, 1.0), (3, 1.5), (2, 2.0)])
def test_generation_is_token_for_token_the_same(
    mt5: MT5ForConditionalGeneration, attention: str, beams: int, penalty: float
) -> None:
    """Greedy and by beams, from texts of five lengths, that end at different steps."""
    mt5.set_attn_implementation(attention)
    mt5.lm_head.weight.data[1] *= 2.5  # so that some rows end early
    pali = _ours(mt5)
    lengths = (7, 3, 12, 1, 9)
    rows = [example(seed, 0, length, 0) for seed, length in enumerate(lengths)]
    text = _text(rows)
    theirs = mt5.eval().generate(
        input_ids=text["input_ids"],
        attention_mask=text["attention_mask"],
        do_sample=False,
        num_beams=beams,
        length_penalty=penalty,
        max_new_tokens=24,
    )[:, 1:]
    theirs = theirs.masked_fill((theirs == 1).cumsum(1) - (theirs == 1).long() > 0, 0)  # it pads beams with EOS
    search = {"num_beams": beams, "length_penalty": penalty, "length_norm": "hugging_face"}
    ours = generate(pali, micro_batch([[e] for e in rows]), 24, **search)
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    ends = (ours == 1).any(1)
    assert ends.any() and (beams > 1 or not ends.all()), "the rows should end at different steps"
    assert len({row.index(1) if 1 in row else 24 for row in ours.tolist()}) > 1
    assert len(ours.unique()) > 5


def test_weights_go_out_and_come_back_exactly(mt5: MT5ForConditionalGeneration, siglip: SiglipVisionModel) -> None:
    pali = _ours(mt5, siglip)
    for tower, table in ((mt5, mt5_table(MT5)), (siglip, siglip_table(VIT))):
        exported = export_tensors(logical_tensors(pali), table)
        original = tower.state_dict()
        for name, tensor in exported.items():
            assert torch.equal(tensor, original[name]), name
        assert all(name.endswith("embed_tokens.weight") for name in original.keys() - exported.keys())
        tower.load_state_dict(exported, strict=False)

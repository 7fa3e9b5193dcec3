"""Parameters, FLOPs and activation bytes: against the paper's numbers, and against what is built and measured."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ConfigurationError
from model.attention.bias import reach, relative_buckets
from model.batch import MicroBatch
from model.config import ClassifierConfig, ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.costs import BatchShape, batch_flops, unit_costs
from model.describe import describe, main, one_example, read_model
from model.pali import PaLI, build, plan_on_meta, units
from tests.unit.model.examples import MODEL, PALI, VIT, example, micro_batch

PRESETS = {"pali_3b": 3.074, "pali_5b": 5.037, "pali_15b": 14.771, "pali_17b": 16.734}  # billions of parameters
# Millions of parameters: of big_vision's encoders (no pooling, no head) at 224 pixels, and of T5X's mT5.
VITS = {"base": 85.7, "large": 303.2, "so400m": 412.4, "huge": 630.8, "giant": 1011.2, "gigantic": 1842.8,
        "enormous": 3805.4}  # fmt: skip
MT5S = {"small": 300.2, "base": 582.4, "large": 1229.6, "xl": 3742.6, "xxl": 12921.1}

# TFLOP of one training example for 16/16, 32/32, 64/64, 128/128 input/target tokens; printed to three digits or so.
TFLOP = {
    ("pali_3b", "frozen_224"): ("1.63", "1.73", "1.93", "2.33"),
    ("pali_3b", "full_224"): ("3.56", "3.66", "3.86", "4.25"),
    ("pali_3b", "full_588"): ("27.3", "27.4", "27.7", "28.2"),
    ("pali_5b", "frozen_224"): ("2.64", "2.74", "2.94", "3.34"),
    ("pali_5b", "full_588"): ("48.9", "49.0", "49.2", "49.7"),
    ("pali_15b", "frozen_224"): ("10.6", "11.7", "14.0", "18.7"),
    ("pali_15b", "full_588"): ("85.0", "86.2", "88.7", "93.7"),
    ("pali_17b", "frozen_224"): ("11.6", "12.7", "15.1", "19.7"),
    ("pali_17b", "full_224"): ("15.5", "16.7", "19.0", "23.7"),
    ("pali_17b", "full_588"): ("106.5", "107.8", "110.3", "115.3"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_the_presets(preset: str) -> None:
    planned = plan_on_meta(*read_model([f"model={preset}", "phases=full_224"]))
    assert round(sum(p.numel() for p in planned.parameters()) / 1e9, 3) == PRESETS[preset]


@pytest.mark.parametrize("vit", VITS)
def test_parameters_of_the_vits(vit: str) -> None:
    planned = plan_on_meta(*read_model([f"vit={vit}", "mt5=mini", "phases=full_224"]))
    counted = {name: p.numel() for name, p in planned.named_parameters()}
    encoder = ("patches.", "vit_block_", "bridge.vit_norm.")
    assert sum(n for name, n in counted.items() if name.startswith(encoder)) / 1e6 == pytest.approx(VITS[vit], abs=0.05)


def test_a_tower_alone_has_the_parameters_of_its_paper_and_its_formulas() -> None:
    """The paper's 3926 M of ViT-e are its encoder, the MAP head and 29,593 classes (Table 1)."""
    whole, _ = read_model(["vit=enormous", "mt5=small", "phases=full_224"])
    found = {}
    for tower, head in (("vit", "map"), ("vit", "patches"), ("mt5", "none")):
        config = replace(whole, tower=tower, classifier=ClassifierConfig(head, 29593))
        costs = list(unit_costs(plan_on_meta(config).units(), one_example(config, 32, 32)))
        for unit in costs:
            assert unit.cost.parameters == sum(p.numel() for p in unit.unit.parameters()), unit.name
        found[head] = round(sum(unit.cost.parameters for unit in costs) / 1e6, 1)
    assert (found["map"], found["none"]) == (3926.4, MT5S["small"])


@pytest.mark.parametrize("mt5", MT5S)
def test_parameters_of_the_mt5s(mt5: str) -> None:
    planned = plan_on_meta(*read_model(["vit=mini", f"mt5={mt5}", "phases=full_224"]))
    counted = {name: p.numel() for name, p in planned.named_parameters()}
    vision = ("patches.", "vit_block_", "bridge.vit_norm.", "bridge.projection.")
    found = sum(n for name, n in counted.items() if not name.startswith(vision))
    assert found / 1e6 == pytest.approx(MT5S[mt5], abs=0.05)


@pytest.mark.parametrize(
    ("vit", "mt5"), [*((vit, "mini") for vit in VITS), *(("mini", mt5) for mt5 in MT5S), ("mini", "mini")]
)
def test_formulas_count_the_parameters_of_every_unit_of_every_size(vit: str, mt5: str) -> None:
    config, _ = read_model([f"vit={vit}", f"mt5={mt5}", "phases=full_224"])
    for unit in unit_costs(plan_on_meta(config).units(), one_example(config, 32, 32)):
        assert unit.cost.parameters == sum(p.numel() for p in unit.unit.parameters()), unit.name


@pytest.mark.parametrize(("preset", "phases"), TFLOP)
def test_training_flops_of_the_paper(preset: str, phases: str) -> None:
    config, frozen = read_model([f"model={preset}", f"phases={phases}"])
    planned = plan_on_meta(config, frozen)
    for tokens, printed in zip((16, 32, 64, 128), TFLOP[preset, phases], strict=True):
        found = batch_flops(planned.units(), one_example(config, tokens, tokens)) / 1e12
        digits = len(printed.split(".")[1])
        assert found == pytest.approx(float(printed), abs=0.5001 * 10**-digits), (tokens, printed)


@pytest.mark.parametrize(("size", "gigaflops"), [("giant", 532), ("gigantic", 964), ("enormous", 1974)])
def test_forward_flops_of_the_vits(size: str, gigaflops: float) -> None:
    config, _ = read_model([f"vit={size}", "mt5=mini", "phases=full_224"])
    priced = unit_costs(plan_on_meta(config).units(), one_example(config, 32, 32))
    vision = [u for u in priced if u.name.startswith(("patch", "vit"))]
    assert sum(u.cost.flops for u in vision) / 1e9 == pytest.approx(gigaflops, abs=0.5)


def test_frozen_units_above_trained_ones_pay_for_the_gradient_of_their_input() -> None:
    config, _ = read_model(["phases=full_224"])
    planned, shape = plan_on_meta(config, ["encoder_block_1.*"]), one_example(config, 8, 8)
    priced = {u.name: u for u in unit_costs(planned.units(), shape)}
    assert priced["encoder_block_1"].training_flops == 2 * priced["encoder_block_1"].cost.flops
    assert priced["encoder_block_1"].kept_bytes > 0
    assert priced["encoder_block_0"].training_flops == 3 * priced["encoder_block_0"].cost.flops


def test_flops_of_a_batch_are_those_of_its_examples() -> None:
    config, frozen = read_model(["model=pali_3b", "phases=frozen_224"])
    planned, one = plan_on_meta(config, frozen), one_example(config, 32, 32)
    four = BatchShape(4, one.vision_tokens, 4, one.encoder_tokens, one.decoder_tokens)
    assert batch_flops(planned.units(), four) == pytest.approx(4 * batch_flops(planned.units(), one))


def test_counted_flops_are_what_torch_counts() -> None:
    """Forward FLOPs of every unit, against torch's own counter on matrix products and attention."""
    batch = micro_batch([[example(1)], [example(2)]])
    (rows, encoder_tokens), decoder_tokens = batch.encoder_tokens.shape, batch.decoder_tokens.shape[1]
    shape = BatchShape(2, VIT.num_tokens(MODEL.image_size), rows, encoder_tokens, decoder_tokens)
    pali = PaLI(units(PALI))
    carry: tuple[torch.Tensor, ...] = ()
    for name, unit in pali.units():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            carry = unit(carry, batch)
        targets = batch.num_targets / batch.decoder_tokens.numel()  # the head skips what is no target
        expected = unit.cost(shape).flops * (targets if name == "head" else 1)
        assert counter.get_total_flops() == pytest.approx(expected), name


def test_description_folds_equal_blocks_and_adds_up() -> None:
    table = describe(*read_model(["model=pali_17b", "phases=frozen_224"]), 32, 32)
    lines = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [line[0] for line in lines] == [
        "patches",
        "vit_block x 56",
        "bridge",
        "encoder_block x 24",
        "encoder_norm",
        "decoder_block x 24",
        "head",
    ]
    assert [line[2] for line in lines] == ["frozen", "frozen", "yes", "yes", "yes", "yes", "yes"]
    footers = [column.footer for column in table.columns]
    assert footers[1] == "16.734 B" and footers[3].endswith("TFLOP") and footers[4] == "12.728 TFLOP"
    assert lines[1][5] == "0.0 MiB", "a frozen ViT keeps nothing"
    scale = {"B": 1e3, "M": 1.0, "TFLOP": 1.0, "MiB": 1.0}
    for column in (1, 3, 4, 5):
        values = [text.replace(",", "").split() for text in [*(line[column] for line in lines), footers[column]]]
        *parts, total = [float(number) * scale[unit] for number, unit in values]
        assert sum(parts) == pytest.approx(total, rel=1e-3), column


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "model.describe", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_command_line() -> None:
    done = _run("model=pali_17b", "phases=frozen_224", "input_tokens=64", "target_tokens=64")
    assert done.returncode == 0, done.stderr
    assert "vit_block x 56" in done.stdout and "16.734 B" in done.stdout and "15.0" in done.stdout


def test_settings_may_refer_to_others() -> None:
    config, _ = read_model(["model=pali_mini", "vit.depth=${mt5.num_heads}"])
    assert config.vit.depth == read_model(["model=pali_mini"])[0].mt5.num_heads


@pytest.mark.parametrize(("word", "sentence"), [
    ("phases.minni.freeze=[x]", "phases.minni is not a setting; did you mean phases.mini?"),
    ("phases.mini.freez=[x]", "model.describe does not read phases.mini.freez; did you mean phases.mini.freeze?"),
    ("phases.mini.tensor=2", "model.describe does not read phases.mini.tensor; leave it out."),
])  # fmt: skip
def test_a_misspelled_phase_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        main([word])
    assert str(error.value) == sentence


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    done = _run("model=pali_18b")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "pali_17b" in done.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("vit.widht=3", "widht"),
        ("vit.width=wide", "wide"),
        ("input_tokens=many", "many"),
        ("vit.num_heads=5", "multiple"),
    ],
)
def test_mistakes_name_what_is_wrong(override: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        main([override])


def test_nothing_stays_in_hydras_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which belongs to the process: what composes next would be checked against a schema of our groups alone."""
    store = {name: node for name, node in ConfigStore.instance().repo.items() if name != "run_schema.yaml"}
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(store))
    read_model(["model=pali_3b"])
    with pytest.raises(ConfigurationError):
        read_model(["model=pali_18b"])
    assert ConfigStore.instance().repo == store


def test_the_model_has_the_stages_image_size_and_freeze_patterns() -> None:
    config, frozen = read_model(["model=pali_3b", "phases=full_588"])
    assert config.model.image_size == 588 and frozen == []


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps (input and root mean square); torch's CPU form keeps the normalized input too."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):  # type: ignore[no-untyped-def]
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def _kept_bytes(pali: PaLI, batch: MicroBatch) -> dict[str, int]:
    """Of every unit: bytes of the distinct storages that autograd keeps, parameters and masks left out."""
    lengths, cpu = (batch.encoder_tokens.shape[1], batch.decoder_tokens.shape[1]), torch.device("cpu")
    far = zip((reach(n, PALI.mt5) for n in lengths), (True, False), strict=True)
    buckets = [relative_buckets(n, n, both, 32, 128, cpu) for n, both in far]
    masks = (batch.encoder_mask.allowed, batch.decoder_mask.allowed, batch.cross_mask.allowed, *buckets)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in (*pali.parameters(), *masks)}
    kept: dict[str, int] = {}
    carry: tuple[torch.Tensor, ...] = ()
    for name, unit in pali.units():
        kept[name] = 0

        def keep(x: torch.Tensor, name: str = name) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage
                kept[name] += storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            carry = unit(carry, batch)
        if name == "encoder_norm":  # its output is kept by the decoder's first block, for all of them
            keep(carry[0])
    return kept


@pytest.mark.parametrize(
    ("dtype", "length", "targets", "recompute"),
    [
        (torch.float32, 96, 32, "none"),
        (torch.float32, 160, 96, "none"),
        (torch.bfloat16, 96, 32, "none"),
        (torch.bfloat16, 160, 96, "none"),
        (torch.float32, 160, 96, "attention"),
        (torch.float32, 160, 96, "mlp"),
        (torch.float32, 160, 96, "norm"),
        (torch.bfloat16, 160, 96, "elementwise"),
    ],
)
def test_activation_formulas_are_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, length: int, targets: int, recompute: str
) -> None:
    """Within 2 %: the formulas leave out the statistics of norms."""
    monkeypatch.setattr(torch.nn.functional, "rms_norm", _FusedRMSNorm.apply)
    vit = ViTConfig(width=96, depth=2, mlp_dim=384, num_heads=4, patch_size=14)
    mt5 = MT5Config(
        d_model=128, d_ff=256, d_kv=32, num_heads=6, num_encoder_layers=2, num_decoder_layers=2, vocab_size=512
    )
    model, rows = ModelConfig(image_size=112), 3
    pali = build(PaLIConfig(vit, mt5, model)).to(dtype)
    for _, unit in pali.units():
        unit.recompute = recompute
    segments, ids = torch.ones(rows, length, dtype=torch.long), torch.ones(rows, targets, dtype=torch.long)
    visual = torch.full((rows, length), -1)
    visual[:, :64] = torch.arange(rows * 64).view(rows, 64)
    images = torch.zeros(rows, 112, 112, 3, dtype=torch.uint8)
    batch = MicroBatch(images, segments, segments, visual, ids, ids, ids, torch.zeros_like(ids))
    kept = _kept_bytes(pali, batch)
    shape = BatchShape(rows, 64, rows, length, targets, dtype.itemsize)
    for unit in unit_costs(pali.units(), shape):
        gradient = shape.element_bytes * rows * targets * mt5.d_model if unit.name == "head" else 0  # not autograd's
        assert kept[unit.name] + gradient == pytest.approx(unit.kept_bytes, rel=0.02), unit.name


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_a_recomputed_block_keeps_its_input_and_no_more(element_bytes: int) -> None:
    """Of what arrives only the tensor that it changes: the others are kept where they were made."""
    pali, shape = PaLI(units(PALI)), BatchShape(5, 16, 3, 40, 12, element_bytes)
    for _, unit in pali.units():
        unit.recompute = "block"
    elements = {"vit": 5 * 16 * VIT.width, "encoder": 3 * 40 * PALI.mt5.d_model, "decoder": 3 * 12 * PALI.mt5.d_model}
    blocks = {u.name: u.kept_bytes for u in unit_costs(pali.units(), shape) if "_block_" in u.name}
    assert blocks == {name: element_bytes * elements[name.split("_")[0]] for name in blocks}

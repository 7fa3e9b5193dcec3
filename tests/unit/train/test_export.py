"""An exported checkpoint, read here and by transformers: the same weights, the same tokens, and one sentence each for
what cannot be exported or answered."""

import ast
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    MT5ForConditionalGeneration,
    SiglipVisionModel,
    T5ForConditionalGeneration,
)

from common.errors import ConfigurationError
from data.tokenizer import train_tokenizer
from model.weights import logical_tensors
from model.weights.export_folder import tables
from model.weights.source import open_source
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.stored_weights import StoredWeights
from parallel.config import ParallelConfig
from parallel.distributed import Launch
from parallel.layout import Layout
from parallel.process_groups import end_groups
from tests.unit.conf.test_composition import composed
from train.build import build_phase_engine
from train.config import to_yaml
from train.export import choose_family, export
from train.inference import PaLIPipeline
from train.phases import find_span, for_phase, spans
from train.weights.first_weights import check_tokenizer
from train.weights.tower_weights import open_tower

SIZES = (
    "vit.width=24 vit.depth=2 vit.mlp_dim=40 vit.num_heads=4 vit.patch_size=8 mt5.d_model=32 mt5.d_ff=56 mt5.d_kv=12 "
    "mt5.num_heads=4 mt5.num_encoder_layers=2 mt5.num_decoder_layers=3 mt5.vocab_size=512 run.steps=2 tracker=none "
    "schedule.warmup_steps=0 schedule.peak=0.01 phases.mini.image_size=32 "
)
ROOT = Path(__file__).parents[3]
PROMPTS = ["Answer in EN: what is blue? <extra_id_0>", "a red circle <extra_id_0>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Iterator[Path]:
    """Make a run's folder: settings, and checkpoints of two steps; the ViT is frozen, norms and biases are rough."""
    folder = tmp_path_factory.mktemp("run")
    words = [*SIZES.split(), f"run.folder={folder}", f"data.tokenizer={tokenizer_path}", "run.precision=bf16"]
    config = composed(*words, "phases.mini.freeze=['vit_block_*','patches.*']")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    span = find_span(spans(config), 2)
    layout = Layout.start(ParallelConfig(), Launch(0, 1, 0))
    engine = build_phase_engine(for_phase(config, span), span.phase, layout, restored=False)
    generator = torch.Generator().manual_seed(5)
    for rectangle, values in engine.held_weights():
        rough = "norm" in rectangle.name or rectangle.name.endswith("bias") or "output" in rectangle.name
        values += rough * 0.3 * torch.randn(values.shape, generator=generator)
    saver = Checkpointer.from_run(folder)
    for step in (1, 2):
        saver.save(engine, step, {})
        saver.wait()
        engine.held_weights()[0][1].add_(1.0)
    yield folder
    end_groups()


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export(str(run), max_shard_gb=2e-5)  # 20 kB a file: several files


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(path)
    return path


def inputs(folder: Path, image: Path) -> dict[str, Tensor]:
    """Return a batch of two images with prompts of two lengths, made by transformers alone."""
    tokenizer, processor = (
        each.from_pretrained(folder, trust_remote_code=True) for each in (AutoTokenizer, AutoImageProcessor)
    )
    pixels = processor([Image.open(image)] * 2, return_tensors="pt")
    return {**tokenizer(PROMPTS, return_tensors="pt", padding=True), **pixels}


def test_it_is_read_here_and_equals_the_checkpoint_to_the_last_bit(run: Path, exported: Path) -> None:
    assert exported == run / "export" and len(list(exported.glob("*/model-*.safetensors"))) > 3
    ours, stored = (logical_tensors(PaLIPipeline.from_folder(each).model) for each in (exported, run))
    assert ours.keys() == stored.keys() and all(torch.equal(ours[name], stored[name]) for name in ours)


def test_transformers_reads_the_towers_and_the_whole(run: Path, exported: Path) -> None:
    ours = logical_tensors(PaLIPipeline.from_folder(run).model)
    text, found = MT5ForConditionalGeneration.from_pretrained(exported / "text", output_loading_info=True)
    assert not any(found.values()), found
    vision, found = SiglipVisionModel.from_pretrained(exported / "vision", output_loading_info=True)
    assert not any(found.values()), found
    whole, found = AutoModelForImageTextToText.from_pretrained(
        exported, trust_remote_code=True, output_loading_info=True
    )
    assert not any(found.values()), found
    assert vision.dtype == torch.float32  # its last norm is trained, so not all of it is bf16
    theirs = whole.state_dict()
    for table in tables(PaLIPipeline.from_folder(exported).config).values():
        for name, tensor in table.items():
            assert torch.equal(tensor.read(theirs[tensor.name]), ours[name]), name
    assert all(torch.equal(value, theirs[name]) for name, value in text.state_dict().items())
    assert all(torch.equal(value, theirs[f"vision_model.{name}"]) for name, value in vision.state_dict().items())


def test_generate_of_transformers_gives_our_tokens(exported: Path, image: Path, tmp_path: Path) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True).eval()
    batch = inputs(exported, image)
    pipeline = PaLIPipeline.from_folder(exported)
    greedy = theirs.generate(**batch, max_new_tokens=12)
    answers = [pipeline.tokenizer.decode(row) for row in greedy[:, 1:].tolist()]
    assert pipeline.ask_all([image, Image.open(image)], PROMPTS, max_new_tokens=12) == answers
    assert len(set(answers)) == 2
    beams = theirs.generate(**batch, max_new_tokens=12, num_beams=3, length_penalty=1.0)
    found = [pipeline.tokenizer.decode(row) for row in beams[:, 1:].tolist()]
    search = {"num_beams": 3, "length_penalty": 1.0, "length_norm": "hugging_face"}
    assert pipeline.ask_all([image, image], PROMPTS, max_new_tokens=12, **search) == found
    theirs.save_pretrained(tmp_path)  # once more through transformers
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again.generate(**batch, max_new_tokens=12), greedy)


def test_a_t5_goes_out_as_a_t5(run: Path, exported: Path, image: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "t5").mkdir()  # an empty folder may be there
    folder = export(str(run), str(tmp_path / "t5"), text_model="t5")
    assert not list(folder.rglob("*-of-*"))  # 2 GB a file by default
    text, found = T5ForConditionalGeneration.from_pretrained(folder / "text", output_loading_info=True)
    assert not any(found.values()), found
    words = {"input_ids": torch.tensor([[7, 8, 9, 1]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    theirs = MT5ForConditionalGeneration.from_pretrained(exported / "text")
    torch.testing.assert_close(text(**words).logits, theirs(**words).logits)
    mt5, t5 = (
        AutoModelForImageTextToText.from_pretrained(each, trust_remote_code=True).eval() for each in (exported, folder)
    )
    assert isinstance(t5, T5ForConditionalGeneration) and not isinstance(mt5, T5ForConditionalGeneration)
    batch = inputs(exported, image)
    assert torch.equal(*(model.generate(**batch, max_new_tokens=12) for model in (mt5, t5)))

    config = composed(*SIZES.split(), f"run.folder={run}", f"data.tokenizer={tokenizer_path}")
    assert choose_family(config, None) == "mt5"
    for given in (folder, folder / "text"):
        config.weights.mt5 = str(given)
        assert choose_family(config, None) == "t5"
    with pytest.raises(ConfigurationError, match="text_model=umt5 is not what the run trained; choose mt5 or t5"):
        choose_family(config, "umt5")


def test_an_export_gives_its_weights_to_another_run(run: Path, exported: Path) -> None:
    ours, given = logical_tensors(PaLIPipeline.from_folder(run).model), {}
    for tower in ("vit", "mt5"):
        source = open_source(exported, tower, num_heads=4)
        given |= source.tensors | source.projection
    assert given.keys() == ours.keys()
    assert all(torch.equal(stored.read().float(), ours[name]) for name, stored in given.items())


def test_scores_of_given_answers_are_those_of_transformers(exported: Path, image: Path) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True).eval()
    pipeline = PaLIPipeline.from_folder(exported)
    batch, answers = inputs(exported, image), ["a blue square", "red"]
    one = {name: tensor[:1] for name, tensor in batch.items()}
    for answer, ours in zip(answers, pipeline.score(image, PROMPTS[0], answers), strict=True):
        labels = torch.tensor([[*pipeline.tokenizer.encode(answer), 1]])
        assert ours == pytest.approx(-theirs(**one, labels=labels).loss.item() * labels.numel(), rel=1e-4)


def test_the_notebook_runs(run: Path, exported: Path, image: Path) -> None:
    """Execute the code cells of examples/ask.ipynb in order; an expression at the end of a cell is its output."""
    cells = json.loads((ROOT / "examples" / "ask.ipynb").read_text(encoding="utf-8"))["cells"]
    own = f"RUN, IMAGE = {str(run)!r}, {str(image)!r}"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("RUN, IMAGE = ")
    space: dict[str, Any] = {}
    outputs = []
    for source in [own, *code[1:]]:
        *statements, last = ast.parse(source).body
        final = [last] if not isinstance(last, ast.Expr) else []
        exec(compile(ast.Module([*statements, *final], []), "ask.ipynb", "exec"), space)
        if isinstance(last, ast.Expr):
            outputs.append(eval(compile(ast.Expression(last.value), "ask.ipynb", "eval"), space))
    first, batch, drawn, scores, theirs = outputs
    assert [type(each) for each in outputs] == [str, list, str, dict, str]
    assert len(batch) == 2 and drawn
    # The model has learned nothing: it writes sentinels and broken UTF-8, which transformers decodes in its own way.
    assert theirs.split()[-1] == first.split()[-1]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_the_card_names_what_went_in(exported: Path, tokenizer_path: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert all(words in card for words in ("random (seed", str(tokenizer_path), "step 2 of 2", "| vqa |")), card


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("{run}@7", "has no checkpoint of step 7; it has those of 1, 2"),
        ("{run}/nothing", "is no folder of a run"),
        ("{run}/export/text", "is an export or another folder of weights, and no run; name the run that it was"),
        ("{run}", "output=.* is not an empty folder; choose another"),
    ],
)
def test_what_cannot_be_exported(run: Path, exported: Path, checkpoint: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        export(checkpoint.format(run=run))


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    damaged = next((tmp_path / "run" / "checkpoints" / "step_00000002").glob("*.distcp"))
    damaged.unlink()
    with pytest.raises(ConfigurationError, match=f"is damaged .{damaged.name} is missing"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert export(f"{tmp_path / 'run'}@1", str(tmp_path / "out")).is_dir()


def test_a_checkpoint_that_its_run_removes_meanwhile(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    weights = StoredWeights(tmp_path / "run", 2)
    shutil.rmtree(weights.path)
    with pytest.raises(ConfigurationError, match=r"step_00000002 was removed or altered while \S+ was read; name"):
        weights.tensors["head.output.weight"].read()


def test_a_missing_file_of_an_export_is_one_sentence(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    index = json.loads((exported / "model.safetensors.index.json").read_text(encoding="utf-8"))
    lost = index["weight_map"]["lm_head.weight"]
    (tmp_path / "copy" / lost).unlink()
    with pytest.raises(ConfigurationError, match=f"^folder: .*copy.* lacks {lost}, which its"):
        PaLIPipeline.from_folder(tmp_path / "copy")


def test_the_index_of_an_export_has_the_bytes_of_its_tensors(exported: Path) -> None:
    indices = [*exported.rglob("model.safetensors.index.json")]
    assert exported / "model.safetensors.index.json" in indices
    for file in indices:
        index = json.loads(file.read_text(encoding="utf-8"))
        tensors = {
            name: t for each in set(index["weight_map"].values()) for name, t in load_file(file.parent / each).items()
        }
        assert tensors.keys() == index["weight_map"].keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) > 0


def test_an_export_with_another_tokenizer_or_none(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    prompt = PROMPTS[0]
    for place in (copy, copy / "text"):
        (place / "tokenizer.model").unlink()
    ids = PaLIPipeline.from_folder(copy).tokenizer.encode_prompt(prompt)
    assert ids == PaLIPipeline.from_folder(exported).tokenizer.encode_prompt(prompt), "tokenizer.json alone"
    train_tokenizer(["one green star or two gray hats"] * 10, copy / "tokenizer.model", 400)
    shutil.copy(exported / "tokenizer.model", copy / "text")
    with pytest.raises(ConfigurationError, match=r"^folder=.*copy: tokenizer\.model is not the tokenizer of this mod"):
        PaLIPipeline.from_folder(copy)
    config = composed(f"weights.mt5={copy}", f"weights.vit={copy}", "vit=from_weights", "mt5=from_weights")
    with pytest.raises(
        ConfigurationError, match=r"^data\.tokenizer=.*tokenizer\.model has another vocabulary than the to"
    ):
        check_tokenizer(open_tower(str(copy), "mt5"), config)
    config.data.tokenizer = str(exported / "tokenizer.json")
    check_tokenizer(replace(open_tower(str(copy), "mt5"), tokenizer=None), config)
    with pytest.raises(ConfigurationError, match=r"^folder=.*text is neither an export .* nor a run .*; name one"):
        PaLIPipeline.from_folder(copy / "text")


def test_prompts_without_images_and_tokens(exported: Path) -> None:
    pipeline = PaLIPipeline.from_folder(exported)
    assert pipeline.ask_all([], []) == [] and pipeline.score(None, "", []) == []
    with pytest.raises(ConfigurationError, match="1 images are given for 2 prompts; give an image, or None, for each"):
        pipeline.ask_all([None], PROMPTS)
    with pytest.raises(ConfigurationError, match="max_new_tokens=0 must be at least 1"):
        pipeline.ask(None, PROMPTS[0], 0)


@pytest.mark.parametrize("content", [None, b"no image", b""])
def test_an_image_that_cannot_be_read(exported: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"image={path} cannot be read .*; name a"):
        PaLIPipeline.from_folder(exported).ask(path, "Answer in EN: what is it?")

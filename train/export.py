"""Export a checkpoint to a folder that Hugging Face transformers and `train.inference` read.

    python -m train.export checkpoint=runs/demo
    python -m train.export checkpoint=runs/demo@400 output=exports/demo_400

The checkpoint may have been written under any layout. Tensors keep their type: fp32 where they were trained, the run's
precision where they were frozen. docs/weights.md describes the folder.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.files import check_new_folder, write_bytes, write_text, writes
from common.values import PATH, above
from data.tokenizer import Tokenizer, checksum
from data.tokenizer_json import tokenizer_config, tokenizer_json
from model.weights.export_folder import TEXT, fitting_families, write_weights
from model.weights.source import TOWERS, read_tower_config
from parallel.checkpoint.stored_weights import StoredWeights
from train.config import RunConfig
from train.phases import find_span, for_phase, spans
from train.settings.compose import to_run_config
from train.settings.saved_run import read_settings
from train.weights.model_card import model_card
from train.weights.saved_checkpoint import find_checkpoint

GB = 10**9


@dataclass
class Options:
    """Export a checkpoint to a folder that Hugging Face transformers and `train.inference` read."""

    checkpoint: str = MISSING
    """Run's folder (its newest checkpoint), `FOLDER@STEP` or `FOLDER@best`."""
    output: str | None = field(default=None, metadata=PATH)
    """New or empty folder to write. Null by default: `export/` in the run's folder."""
    text_model: str | None = None
    """Family of `text/` in transformers: `mt5`, `t5` (T5 1.1 and Flan-T5, which compute alike), or `umt5` where each
    block has a bias table. Null by default: that of the folder `weights.mt5` of the run, if it is there, else `mt5`."""
    average: bool = False
    """Write the average of the weights (`optimizer.average_decay`) in place of the weights. False by default."""
    max_shard_gb: float = 2.0
    """Most gigabytes (10^9 bytes) of a file of weights, and so of memory that the export takes; a larger tensor is a
    file of its own. 2 by default: it suits laptops and uploads."""

    def __post_init__(self) -> None:
        above("", 0, max_shard_gb=self.max_shard_gb)


def main(words: Sequence[str]) -> None:
    """Export as the words of the command line set it, and print the folder."""
    options = parse(words, Options)
    folder = export(options.checkpoint, options.output, options.max_shard_gb, options.text_model, options.average)
    print(f"exported to {folder}")


def export(
    checkpoint: str,
    output: str | None = None,
    max_shard_gb: float = 2.0,
    text_model: str | None = None,
    average: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face folder, and return the folder; it appears whole or not at all.

    Raises ConfigurationError for a checkpoint that is missing or damaged, for an output that is not empty, and for a
    text_model that computes otherwise.
    """
    weights = StoredWeights(*find_checkpoint(checkpoint)[:2], average)
    config = read_run_config("checkpoint", weights)
    tokenizer, family = checked_tokenizer(config, weights), choose_family(config, text_model)
    folder = Path(output) if output is not None else weights.run / "export"
    check_new_folder(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with writes(f"output={folder}", "another folder"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            max_bytes, vocabulary = int(max_shard_gb * GB), tokenizer.vocabulary()
            write_weights(partial, config.pali, family, weights.tensors, max_bytes, _print_progress, vocabulary)
            for place in (partial, partial / TEXT):
                write_tokenizer(place, tokenizer)
            write_text(partial / "README.md", model_card(config, weights, family))
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_run_config(key: str, weights: StoredWeights) -> RunConfig:
    """Return the settings of a checkpoint's run as the phase of its step has them. Raises ConfigurationError."""
    settings = read_settings(weights.run)
    if settings is None:
        raise ConfigurationError(f"{key}={weights.run} holds no run (no config.yaml); name a run's folder.")
    config = to_run_config(settings)
    if (tower := config.pali.tower) is not None:
        raise ConfigurationError(
            f"{key}={weights.run} trained the {TOWERS[tower]} alone, which is for weights.{tower} of a run of both "
            "towers; name such a run."
        )
    return for_phase(config, find_span(spans(config), weights.step))


def checked_tokenizer(config: RunConfig, weights: StoredWeights) -> Tokenizer:
    """Return the tokenizer of a run. Raises ConfigurationError where the file is missing, or was changed since."""
    tokenizer = Tokenizer(config.data.tokenizer)
    if (saved := weights.extra.get("tokenizer")) not in (None, checksum(config.data.tokenizer)):
        raise ConfigurationError(
            f"data.tokenizer={config.data.tokenizer} is not the file that the run was trained with (SHA-256 {saved}); "
            "bring that one back from a copy."
        )
    return tokenizer


def choose_family(config: RunConfig, text_model: str | None) -> str:
    """Return the family of the text part: the wanted one, else that of the run's `weights.mt5`, else the usual one."""
    fitting = fitting_families(config.pali)
    if text_model is None:
        given = read_tower_config(Path(config.weights.mt5), "mt5", "weights.mt5") if config.weights.mt5 else None
        found = (given or {}).get("model_type")
        return found if found in fitting else fitting[0]
    if text_model not in fitting:
        raise ConfigurationError(f"text_model={text_model} is not what the run trained; choose {' or '.join(fitting)}.")
    return text_model


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as SentencePiece has it, and as Hugging Face reads it."""
    write_bytes(folder / "tokenizer.model", tokenizer.model)
    write_text(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_text(folder / "tokenizer_config.json", json.dumps(tokenizer_config(), indent=1) + "\n")


def _print_progress(file: str) -> None:
    print(f"writing {file}", flush=True)


if __name__ == "__main__":
    run_command(main)

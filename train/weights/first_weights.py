"""Check that first weights fit the model, and that nothing random is frozen."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common.errors import ConfigurationError
from data.tokenizer import Tokenizer, checksum
from model.layers import Part, parameter_parts
from model.pali import PaLI
from model.weights.source import VIT_PREFIXES, is_of_tower
from model.weights.stored import is_weights, listed
from parallel.checkpoint.folder import CheckpointFolder
from train.config import RunConfig
from train.phases import spans
from train.weights.tower_weights import TowerWeights, open_towers

PADDING = 128  # Google's T5s round their vocabulary up to a multiple of it
SHOWN = 3  # units named in a message; a tower has dozens


def first_files(config: RunConfig) -> list[str]:
    """List what gives the towers their first weights."""
    return [value for value in (config.weights.vit, config.weights.mt5) if value is not None]


def check_first_weights(config: RunConfig, phases: Sequence[PaLI], expected: Collection[Path] = ()) -> None:
    """Raise ConfigurationError for weights that do not fit the model, and for a phase that freezes random weights.

    `phases`: the model of every phase on `meta`, with its frozen parameters. `expected`: files of earlier jobs to come,
    which are taken to hold their whole tower.
    """
    if CheckpointFolder.from_run(config.run.folder).steps():
        return  # the run has weights of its own
    if config.run.initial is not None and first_files(config):
        raise ConfigurationError(
            f"run.initial={config.run.initial} gives the weights of both towers; set weights.vit=null and "
            "weights.mt5=null, or leave run.initial out."
        )
    parts = {part.name: part for _, part in parameter_parts(phases[0])}
    later = {tower for tower in ("vit", "mt5") if _is_later(getattr(config.weights, tower), expected)}
    given = {name for name in parts for tower in later if is_of_tower(name, tower)}
    there = type(config.weights)(**{t: v for t, v in vars(config.weights).items() if t not in later})
    for opened in open_towers(there, config.vit.num_heads):
        check_fit(opened, config, parts)
        if not _is_later(config.data.tokenizer, expected):
            check_tokenizer(opened, config)
        given |= opened.names
    if config.run.initial is None and not config.run.from_scratch:
        _check_frozen(config, phases, given)


def check_fit(opened: TowerWeights, config: RunConfig, parts: Mapping[str, Part]) -> None:
    """Raise ConfigurationError, with a list of the differences, for weights of another model than the run's."""
    tower = opened.where.partition("=")[0].partition(".")[2]
    ours = asdict(getattr(config, tower))
    different = [f"{tower}.{key}={ours[key]} (there {n})" for key, n in opened.sizes.items() if ours.get(key) != n]
    if different:
        raise ConfigurationError(
            f"{opened.where} is of another size than the run: {', '.join(different)}; set {tower}=from_weights, or "
            "give weights of the run's size."
        )
    wanted = {name for name in parts if is_of_tower(name, tower)}
    complaints = [
        f"{verb} {_some(names)}"
        for verb, names in (
            ("lacks", wanted - opened.names),
            ("also holds", opened.names - parts.keys()),
        )
        if names
    ]
    shapes = [name for name in sorted(opened.names & parts.keys()) if not parts[name].fits(opened.shape(name))]
    complaints += [
        f"has {name} as {tuple(opened.shape(name))}, here it is {tuple(parts[name].shape)}" for name in shapes[:SHOWN]
    ]
    complaints += [f"{len(shapes) - SHOWN} more shapes"] * (len(shapes) > SHOWN)
    if complaints:
        raise ConfigurationError(f"{opened.where} {', '.join(complaints)}; give weights of the run's {tower}.")
    kinds = {str(x.dtype) for name, x in opened.stored.items() if name in opened.names and not is_weights(x.dtype)}
    if kinds:
        raise ConfigurationError(
            f"{opened.where} holds tensors of type {listed(kinds)}, which is no type of weights; write them as fp32, "
            "fp16 or bf16."
        )


def check_tokenizer(opened: TowerWeights, config: RunConfig) -> None:
    """Raise ConfigurationError where the run's tokenizer is not the one that an mT5 was trained with.

    The tokenizer of the weights is compared where it is known. A public folder may hold the tokenizer of another model,
    so its vocabulary must be that of the run's tokenizer, rounded up to a multiple of 128, as Google's T5s have it.
    """
    path = config.data.tokenizer
    key = f"data.tokenizer={path}"
    if opened.checksum is not None:
        if opened.checksum != (now := checksum(path)):
            raise ConfigurationError(
                f"{key} is another tokenizer than that of {opened.where} (SHA-256 {now[:12]}…, not "
                f"{opened.checksum[:12]}…); set data.tokenizer={opened.tokenizer}, or give other weights."
            )
        return
    if opened.tokenizer is None and opened.vocabulary is None and not opened.padded:
        return
    tokenizer = Tokenizer(path)  # once, as mT5's has 250,100 pieces
    if opened.tokenizer is not None and opened.tokenizer != Path(path):
        mine, theirs = tokenizer.pieces(), Tokenizer(opened.tokenizer).pieces()
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            first = f"piece {at} is {mine[at]!r}, not {theirs[at]!r}" if at is not None else "one is longer"
            raise ConfigurationError(
                f"{key} has another vocabulary than {opened.where} ({len(mine)} pieces, not {len(theirs)}; {first}); "
                f"set data.tokenizer={opened.tokenizer}."
            )
    if opened.vocabulary is not None and opened.vocabulary != tokenizer.vocabulary():
        raise ConfigurationError(
            f"{key} has another vocabulary than the tokenizer that {opened.where} was exported with; export the model "
            "again, or set data.tokenizer to the one that it was trained with."
        )
    if opened.padded and (unused := config.mt5.vocab_size - tokenizer.vocab_size) >= PADDING:
        raise ConfigurationError(
            f"{key} leaves {unused} of the {config.mt5.vocab_size} ids of {opened.where} unused, so it is another "
            "tokenizer than that of the weights; set data.tokenizer to the one that they came with."
        )


def _is_later(value: str | None, expected: Collection[Path]) -> bool:
    return value is not None and Path(value) in expected


def _check_frozen(config: RunConfig, phases: Sequence[PaLI], known: set[str]) -> None:
    """Raise ConfigurationError for a frozen tensor that neither a file nor an earlier phase has given a value."""
    for span, model in zip(spans(config), phases, strict=True):
        trained = {part.name for parameter, part in parameter_parts(model) if parameter.requires_grad}
        random = {part.name for _, part in parameter_parts(model)} - trained - known
        if random:
            vit = any(name.startswith(VIT_PREFIXES) for name in random)
            raise ConfigurationError(
                f"phase {span.name!r} freezes {_some(random)}, whose first weights would be random; give them by "
                f"weights.{'vit' if vit else 'mt5'}=<folder or file>, or by run.initial, or set run.from_scratch=true."
            )
        known |= trained


def _some(names: Collection[str]) -> str:
    """List the units of tensors, shortened."""
    units = list(dict.fromkeys(name.split(".")[0] for name in sorted(names)))
    more = f" and {len(units) - SHOWN} more units" if len(units) > SHOWN else ""
    return ", ".join(units[:SHOWN]) + more + f" ({len(names)} tensors)"

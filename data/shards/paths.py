"""Find the tars of a split of a source: the split, or a synonym, is a word of their names.

A word is a run of letters: `cc3m-train-0000.tar`, `val_000.tar`, `Test2017.tar` and `train/0.tar` name a split each.
Ambiguous names are refused, because nobody would notice that a test shard is trained on.
"""

import difflib
import fnmatch
import glob
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from common.errors import ConfigurationError, Notice
from common.launcher import is_main_rank
from data.shards.remote import is_url, listing
from data.storage import PATIENCE_S, is_folder, not_permitted, retry

SPLITS = ("train", "validation", "test")
SYNONYMS = {
    "train": ("train", "training", "trn", "trainset", "trainval"),
    "validation": (
        *("validation", "valid", "val", "dev", "eval", "evaluation", "minival", "holdout", "heldout"),
        *("validationset", "validset", "valset", "devset", "evalset"),
    ),
    "test": ("test", "testing", "tst", "testset", "testdev"),
}
SPLIT_OF = {word: split for split, words in SYNONYMS.items() for word in words}
WORD = re.compile(r"[^\W\d_]+")
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # between two words of `ValShard`
MOST_NAMES = 1_000_000  # of one pattern; more come from a digit too many
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
WAYS_OUT = {
    "train": "",
    "validation": ", hold out a share of the training records (data.holdout=0.01), or train without a validation "
    "(evaluation.every_steps=0)",
    "test": ", or evaluate another split (evaluation.split=validation)",
}


@dataclass(frozen=True)
class Part:
    """Select records by a hash, a fraction of 1: those in [first, last)."""

    first: float = 0.0
    last: float = 1.0


def locations(root: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Return the locations of sources by name: those given, else the folders of `root` that hold tars.

    The tars may lie one folder deeper. Raises ConfigurationError where there is none.
    """
    if sources:
        return {name: place if is_url(place) else os.path.join(root, place) for name, place in sources.items()}
    folders = [] if is_url(root) else sorted(path for path in Path(root).glob("*") if path.is_dir())
    found = {each.name: str(each) for each in folders if any(each.glob("*.tar")) or any(each.glob("*/*.tar"))}
    if found:
        return found
    if not is_url(root) and any(Path(root).glob("*.tar")):
        folder, name = os.path.split(os.path.abspath(root))
        raise ConfigurationError(
            f"root={root} holds tars itself, and is a source; set root={folder}, and sources={{{name}: {name}}} to "
            "leave its other folders out."
        )
    if is_url(root):
        held = "it is a URL, in which sources are not searched for"
    elif folders:
        held = f"it holds the folders {', '.join(path.name for path in folders[:10])}"
    else:
        held = "it holds no folder" if os.path.isdir(root) else "there is no such folder"
    raise ConfigurationError(
        f"no folder of shards in {root}: point root to a corpus (<root>/<source>/<split>-*.tar), name its sources "
        f"(sources={{webli: webli}}), or make one (python -m data.miniature); {held}."
    )


def shard_paths(location: str, split: str, patience_s: float = PATIENCE_S) -> list[str]:
    """Return the tars of a split, sorted; raise ConfigurationError if there is none, or if names are ambiguous.

    `location` is a folder or a pattern with `*`, `{000..099}` and, if the split is no word of the names, `{split}`. If
    no name has any split (img2dataset's `00000.tar`), all are training data. A folder of folders is searched one level
    deep. Every name that the braces of a pattern give must exist.
    """
    finder = _Finder(patience_s)
    paths = _of_split(finder, location, split)
    if not paths:
        raise ConfigurationError(
            f"no {split} shards at {location}: point data.root and data.sources to a folder that holds {split}-*.tar"
            f"{WAYS_OUT[split]}{finder.remark(location)}."
        )
    return paths


def parts(location: str, split: str, holdout: float, patience_s: float = PATIENCE_S) -> tuple[list[str], Part]:
    """Return the tars of a split, as `shard_paths`, and the part of their records that belongs to it.

    Without validation shards, the fraction `holdout` of the training records is the validation split; there is no
    substitute for a test split.
    """
    if not holdout or split not in ("train", "validation"):
        return shard_paths(location, split, patience_s), Part()
    if _of_split(_Finder(patience_s), location, "validation"):
        return shard_paths(location, split, patience_s), Part()
    part = Part(first=holdout) if split == "train" else Part(last=holdout)
    return shard_paths(location, "train", patience_s), part


def _of_split(finder: "_Finder", location: str, split: str) -> list[str]:
    if "{split}" in location and not is_folder(location, finder.patience_s):
        return _of_pattern(finder, location, split)
    names = finder.find(location)
    words = {path: _words(name) for path, name in names.items()}
    for path, found in words.items():
        if len({SPLIT_OF[word] for word in found}) > 1:
            raise ConfigurationError(
                f"{path} names more than one split ({', '.join(sorted(found))}): rename it, or give data.sources a "
                "pattern with {split} in it."
            )
    named = {path: found for path, found in words.items() if found}
    if not named:
        return sorted(names) if split == "train" else []
    if len(named) < len(names):
        unnamed = next(path for path in sorted(names) if path not in named)
        raise ConfigurationError(
            f"{min(named)} names a split and {unnamed} names none: rename them, or give data.sources a pattern that "
            "leaves one kind out."
        )
    own = {path: found for path, found in named.items() if SPLIT_OF[next(iter(found))] == split}
    _refuse_synonyms(own, location, split)
    if not own:
        finder.others = sorted({SPLIT_OF[word] for found in named.values() for word in found})
    return sorted(own)


def _of_pattern(finder: "_Finder", pattern: str, split: str) -> list[str]:
    """Return the tars that a pattern matches with the split, or else a synonym of it, in place of `{split}`."""
    found: dict[str, frozenset[str]] = {}
    for word in SYNONYMS[split]:
        found |= {path: frozenset({word}) for path in finder.find(pattern.replace("{split}", word))}
        if word == split and found:
            break
    _refuse_synonyms(found, pattern, split)
    for path in found:
        others = {word for word in _words(os.path.basename(path)) if SPLIT_OF[word] != split}
        if others:
            raise ConfigurationError(
                f"{path} is a {split} shard by the pattern {pattern} and names another split ({', '.join(others)}): "
                "rename it, or narrow the pattern."
            )
    return sorted(found)


def _refuse_synonyms(found: Mapping[str, frozenset[str]], location: str, split: str) -> None:
    kinds = {" ".join(sorted(words)): path for path, words in sorted(found.items())}
    if len(kinds) > 1:
        examples = " and ".join(list(kinds.values())[:2])
        raise ConfigurationError(
            f"{location} has {split} shards of more than one name ({', '.join(kinds)}; {examples}): give data.sources "
            "a pattern that leaves all but one out."
        )


def _words(name: str) -> frozenset[str]:
    return frozenset(word for word in WORD.findall(HUMP.sub(" ", name).lower()) if word in SPLIT_OF)


class _Finder:
    """Find tars; every folder is listed once. `others`: splits that were found instead of the wanted one."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.others: list[str] = []
        self.compressed: list[str] = []
        self._listings: dict[str, dict[str, bool]] = {}

    def find(self, location: str) -> dict[str, str]:
        """Return the tars of a folder or pattern: path -> the part of it that may name a split."""
        if is_url(location):
            location = location.rstrip("/")
        if is_folder(location, self.patience_s) or (is_url(location) and _is_plain_folder(location)):
            return self._in_folder(location)
        if "**" in location:
            raise ConfigurationError(
                f"the shard pattern {location} has a **, which would match one level of folders only: write a * for "
                "each level."
            )
        found: dict[str, str] = {}
        missing: list[str] = []
        fixed = len(_fixed(location))
        for name in _expanded(location):
            matches = self._matches(name)
            if not matches:
                missing.append(name)
            for path in matches:
                found[path] = path[fixed:]
        if missing and found:
            raise ConfigurationError(
                f"{len(missing):,} of the names that {location} spells out are missing ({_few(missing)}): "
                "fetch them, or leave them out of the pattern."
            )
        return found

    def remark(self, location: str) -> str:
        """Return a likely reason that nothing was found, as the end of a sentence, or ""."""
        if self.others:
            return f"; the names there are of {' and '.join(self.others)}"
        if self.compressed:
            return f"; {self.compressed[0]} is compressed, which cannot be read at random access: unpack it"
        if is_folder(location, self.patience_s):
            return self._instead()
        folder, name = os.path.split(location.rstrip("/"))
        if is_url(location) or glob.has_magic(location) or "{" in location:
            return ""
        near = difflib.get_close_matches(name, self._list(folder), n=1)
        return f"; there is no such folder{f', did you mean {near[0]}' if near else ''}"

    def _instead(self) -> str:
        """Return what the listed folders hold, where they hold no tar."""
        files = [name for listing in self._listings.values() for name, is_dir in listing.items() if not is_dir]
        endings = Counter(os.path.splitext(name)[1].lower() for name in files if not _is_tar(name))
        if any(map(_is_tar, files)) or not endings:
            return ""
        held = ", ".join(f"{count:,} x {ending or 'no ending'}" for ending, count in endings.most_common(3))
        if IMAGES & endings.keys():
            return (
                f"; it holds images in files ({held}), which img2dataset writes by default: run it with "
                "output_format=webdataset, or make shards by python -m data.corpus.build"
            )
        way = "; make shards of tables by python -m data.corpus.build" if ".parquet" in endings else ""
        return f"; it holds {held}, and no tar{way}"

    def _in_folder(self, folder: str) -> dict[str, str]:
        """Return a folder's own tars and those of its folders that name a split, or else of all its folders."""
        own = self._tars(folder)
        folders = [name for name, is_dir in self._list(folder).items() if is_dir and not name.startswith(".")]
        nested: dict[str, str] = {}
        for name in folders:
            tars = self._tars(os.path.join(folder, name))
            if not own or _words(name):
                nested |= {os.path.join(folder, name, tar): os.path.join(name, tar) for tar in tars}
            elif tars and is_main_rank():
                message = (
                    f"{os.path.join(folder, name)} holds tars that are not read, as {folder} holds tars itself; move "
                    "them there, or name both in a pattern of data.sources."
                )
                warnings.warn(message, Notice, stacklevel=2)
        return {os.path.join(folder, tar): tar for tar in own} | nested

    def _tars(self, folder: str) -> list[str]:
        listing = self._list(folder)
        tars = [name for name, is_dir in listing.items() if _is_tar(name) and not (is_dir or name.startswith("."))]
        for name in listing:
            suffix = next(filter(name.lower().endswith, COMPRESSED), None)
            if suffix and f"{name[: -len(suffix)]}.tar" not in listing:
                self.compressed.append(os.path.join(folder, name))
        if tars and self.compressed and is_main_rank():
            message = f"{self.compressed[0]} is compressed and not read; unpack it, or move it elsewhere."
            warnings.warn(message, Notice, stacklevel=2)
        return tars

    def _matches(self, name: str) -> list[str]:
        """Return the tars that a pattern without braces matches; a folder gives the tars in it."""
        folder, leaf = os.path.split(name)
        if name.startswith(("http://", "https://")) and _is_tar(name) and not glob.has_magic(name):
            return [name]  # a web server may list nothing; a name that is missing is found when it is opened
        if leaf in self._list(folder):
            return [name] if not is_folder(name, self.patience_s) else list(self._in_folder(name))
        if not glob.has_magic(name):
            return []
        return [path for path in self._glob(name) if _is_tar(path)]

    def _glob(self, pattern: str) -> Iterator[str]:
        """Yield paths as glob.glob does, but raise if a folder cannot be listed."""
        folder, leaf = os.path.split(pattern)
        folders = list(self._glob(folder)) if glob.has_magic(folder) else [folder]
        for place in folders:
            for name, is_dir in self._list(place).items():
                hidden = name.startswith(".") and not leaf.startswith(".")
                if not hidden and fnmatch.fnmatchcase(name, leaf) and not (is_dir and _is_tar(name)):
                    yield os.path.join(place, name)

    def _list(self, folder: str) -> dict[str, bool]:
        """List a folder: name -> whether it is a folder. A path that is no folder gives an empty list."""
        if folder not in self._listings:

            def read() -> dict[str, bool]:
                if is_url(folder):
                    return listing(folder)
                with os.scandir(folder or os.curdir) as entries:
                    return {entry.name: entry.is_dir() for entry in entries}

            try:
                self._listings[folder] = retry(read, folder or os.curdir, self.patience_s)
            except PermissionError as error:
                raise not_permitted(folder) from error
            except ConfigurationError:
                raise
            except (OSError, ValueError):
                self._listings[folder] = {}
        return self._listings[folder]


def _is_plain_folder(url: str) -> bool:
    return not glob.has_magic(url) and "{" not in url and not _is_tar(url)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _fixed(pattern: str) -> str:
    """Return the folder before the first variable part of a pattern, with its slash."""
    variable = re.search(r"[*?\[{]", pattern)
    return pattern[: pattern.rfind("/", 0, variable.start() if variable else len(pattern)) + 1]


def _expanded(pattern: str) -> list[str]:
    """Return the names that a pattern's braces give, each once."""
    try:
        if _num_names(pattern) <= MOST_NAMES:
            names = list(islice(braceexpand(pattern), MOST_NAMES + 1))
            if len(names) <= MOST_NAMES:
                return list(dict.fromkeys(names))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"the shard pattern {pattern} has braces that do not match: write it as name-{{00000..00099}}.tar."
        ) from error
    raise ConfigurationError(
        f"the shard pattern {pattern} spells out more than {MOST_NAMES:,} names: check the numbers in its braces."
    )


def _num_names(pattern: str) -> int:
    """Return the number of names that braceexpand makes of a pattern, or a little more, without making them."""
    # One entry per open brace: [sum of the alternatives before the last comma, product since then].
    open_braces = [[0, 1]]
    for token in re.findall(r"\\.|\{-?\d+\.\.-?\d+(?:\.\.-?\d+)?\}|[{},]", pattern):
        if token == "{":
            open_braces.append([0, 1])
        elif token == ",":
            before, last = open_braces[-1]
            open_braces[-1] = [before + last, 1] if len(open_braces) > 1 else [0, last]
        elif token == "}":
            if len(open_braces) == 1:
                raise ValueError("a brace is closed that was not opened")
            before, last = open_braces.pop()
            open_braces[-1][1] *= before + last
        elif token[0] == "{":
            first, last, *step = map(int, token[1:-1].split(".."))
            open_braces[-1][1] *= abs(last - first) // max(1, abs(step[0]) if step else 1) + 1
    if len(open_braces) > 1:
        raise ValueError("a brace is not closed")
    return open_braces[0][1]


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, …"

"""Add translations of captions and questions from tables, as CC3M-35L and VQ2A-CC3M-35L have them.

A table is a TSV file of a language: English text, translation. Answers stay English, as in the paper: short answers are
mistranslated out of context. Tables become one SQLite file, because 34 languages of 3 million captions exceed memory.
"""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from data import languages
from data.corpus.steps.hashes import digest


def make_table(tables: Mapping[str, str], path: Path) -> None:
    """Write the tables as one SQLite file. Raises ConfigurationError for a missing or broken table."""
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE texts (language TEXT, key INTEGER, translation TEXT, PRIMARY KEY (key, language))"
        )
        for code, name in tables.items():
            spelled = languages.canonical(code)
            if spelled is None:
                raise ConfigurationError(f"translations.{code} is no code of a language, such as de.")
            database.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", _rows(spelled, name))
    database.close()


class Translations:
    """Look translations up."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def find(self, text: str) -> dict[str, str]:
        """Return the translations of an English text by language."""
        rows = self._database.execute("SELECT language, translation FROM texts WHERE key = ?", (_key(text),))
        return dict(sorted(rows))

    def add(self, record: dict[str, Any]) -> int:
        """Add translations to a record's English captions and questions, and return their number."""
        added = 0
        captions = record.get("captions")
        if captions is None and record.get("language") == "en" and record.get("alt_text"):
            captions = {"en": record["alt_text"]}
        if isinstance(captions, dict) and "en" in captions:
            made: dict[str, list[str]] = {}
            for text in _list(captions["en"]):
                for code, translation in self.find(text).items():
                    made.setdefault(code, []).append(translation)
            record["captions"] = {**captions, **{code: own for code, own in made.items() if code not in captions}}
            added += sum(map(len, made.values()))
        questions = record.get("questions") or []
        for one in [each for each in questions if each.get("language", "en") == "en"]:
            for code, translation in self.find(_list(one["question"])[0]).items():
                questions.append({**one, "language": code, "question": translation})
                added += 1
        return added


def _rows(code: str, name: str) -> Any:
    try:
        with open(name, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                text, tab, translation = line.rstrip("\r\n").partition("\t")
                if not tab:
                    raise ConfigurationError(
                        f"translations.{code}={name} has no tab in line {number}; write text<TAB>translation."
                    )
                yield code, _key(text), translation.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"translations.{code}={name} cannot be read ({error}); name a TSV file.") from error


def _key(text: str) -> int:
    return digest(" ".join(text.split())) - (1 << 63)  # SQLite's integers have a sign


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]

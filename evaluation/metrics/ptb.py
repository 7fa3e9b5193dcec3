"""Tokenize English captions as COCO's evaluation does, without Java.

COCO's captions are scored on the tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) without
punctuation. The rules below reproduce them from its output: `tests/unit/evaluation/metrics/test_official.py` compares
both, where Java and pycocoevalcap are installed.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Tokens that pycocoevalcap drops. Brackets stay: it names them in capitals (-LRB-), and the tokens are in lower case.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def _words(text: str) -> list[str]:
    return text.split()


# Words whose final period is part of them; STATES only where they are capitalized, BEFORE_NUMBERS only before a digit.
ABBREVIATIONS = _words(
    "adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr "
    "co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga "
    "gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md mfg mich minn "
    "mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof "
    "profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel "
    "tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"
)
STATES = _words("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash")
BEFORE_NUMBERS = _words("art ca fig figs no nos op pp prop")
# Words that begin a sentence: a single letter before them ends one (vitamin C. The), else it is an initial (C. Smith).
STARTERS = _words(
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. "
    "Ms. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When "
    "While Yet You"
)
SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
REPLACED = {"½": "1/2", "¼": "1/4", "¾": "3/4", "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}

Emit = Callable[[str], tuple[str, ...]]


class Rule(NamedTuple):
    """A kind of token: the longest match at a position wins, of equally long ones the first rule's.

    A group of the pattern is the token; the text after it counts for the length only.
    """

    pattern: re.Pattern[str]
    emit: Emit


def _one(text: str) -> tuple[str, ...]:
    return (text.lower(),)


def _nothing(text: str) -> tuple[str, ...]:
    return ()


def _brackets(text: str) -> tuple[str, ...]:
    return ("".join(BRACKETS.get(letter, letter.lower()) for letter in text),)


def _smiley(text: str) -> tuple[str, ...]:
    return (text.lower().replace("(", "-lrb-").replace(")", "-rrb-"),)


def _word(text: str) -> tuple[str, ...]:
    return SPLIT_WORDS.get(text.lower(), (text.lower(),))


def _any(words: Sequence[str]) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


NO_LETTERS = "[½¼¾²³¹⁰-₟①-⓿]"  # numbers that Python counts as letters of words
MARKS = r"[\u0300-\u036f\u0591-\u05bd\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]"
LETTER = rf"(?:(?!{NO_LETTERS})[^\W\d_]|{MARKS}|\u00ad)"
ALNUM = rf"(?:{LETTER}|\d)"
WORD = rf"{LETTER}{ALNUM}*"
CONTRACTION = r"['’](?:[sSdDmM]|[rR][eE]|[vV][eE]|[lL][lL])"
NEGATION = r"[nN]['’][tT]"
NUMBER = r"[-+:]?(?:\d+(?:[.,:]\d+)*|\.\d+(?:[.,:]\d+)*)"
SLASHED = rf"(?:{LETTER}+(?:-{LETTER}+)+|{ALNUM}+)"
PATH = r"(?:/[^ \t\n\"<>|()]*[^ \t\n\"<>|().!?,;:'-])"  # of an address without a scheme
ATTRIBUTE = r"""[A-Za-z][\w:-]*(?: *= *(?:'[^'\n]*'|"[^"\n]*"|[^\s>"']+))?"""  # of a tag
ENDS_WORD = rf"(?!{ALNUM})"


def _rule(pattern: str, emit: Emit = _one) -> Rule:
    return Rule(re.compile(pattern), emit)


RULES = (
    _rule(rf"</?[A-Za-z][A-Za-z0-9:._-]*(?: +{ATTRIBUTE})* */?>|<[!?][A-Za-z-][^>\n]*>"),
    _rule(r"https?://[^ \t\n\"<>|()]*[^ \t\n\"<>|().!?,;:'…-]"),
    _rule(rf"(?:[A-Za-z0-9][A-Za-z0-9_-]*\.)+(?:com|net|org|edu){PATH}?(?![A-Za-z0-9])"),
    _rule(rf"www\.(?:[A-Za-z0-9_-]+\.)+[A-Za-z]{{2,4}}{PATH}?"),
    _rule(r"[A-Za-z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+"),
    _rule(r"@[A-Za-z_][A-Za-z_0-9]*"),
    _rule(r"#[A-Za-z]+"),
    _rule(rf"({LETTER}{ALNUM}*?){NEGATION}{ENDS_WORD}"),
    _rule(rf"({WORD}){CONTRACTION}{ENDS_WORD}"),
    _rule(rf"{NEGATION}{ENDS_WORD}", lambda text: ("n't",)),
    _rule(rf"{CONTRACTION}{ENDS_WORD}", lambda text: (text.lower().replace("’", "'"),)),
    _rule(rf"(?i:cannot|gimme|gonna|gotta|lemme|wanna|['’]tis|['’]twas){ENDS_WORD}", _word),
    _rule(r"(?i:['’](?:em|till?|cause|n['’]|n(?![A-Za-z])))", lambda text: (text.lower().replace("’", "'"),)),
    _rule(r"['’]\d(?:0s|\d(?=\s|\Z))", lambda text: (text.lower().replace("’", "'"),)),
    _rule(rf"{WORD}"),
    _rule(rf"{ALNUM}+(?:_{ALNUM}+)*"),
    _rule(rf"{ALNUM}(?:{ALNUM}|[.,])*(?:-(?:(?:[A-Za-z]\.)+|{ALNUM}+))+"),
    _rule(rf"{SLASHED}(?:/{SLASHED}){{1,2}}"),
    _rule(rf"{LETTER}{ALNUM}*(?:[!?.]{LETTER}{ALNUM}*)+"),
    _rule(
        rf"(?:{ALNUM}+-)*(?:[A-HJ-XZdlno]['’]{LETTER}{{2,}}|[A-Za-z]+[aeiouyAEIOUY]['’][aeiouA-Z]{LETTER}*)(?:-{ALNUM}+)*"
    ),
    _rule(r"(?i:c['’]mon|s['’]mores|e['’]er|o['’]er)"),
    _rule(r"[A-Z]+(?:&[A-Z]+)+"),
    _rule(r"[Cc]\+\+|[CcFf]#"),
    _rule(r"([yY]['’])[a-zA-Z]", lambda text: ("y'",)),
    _rule(r"(?:[A-Za-z]\.)+[A-Za-z](?![A-Za-z0-9])"),
    _rule(r"(?:[A-Za-z]\.){2,}"),
    _rule(rf"(?:[A-Za-z]\.)+(?:-{ALNUM}+)+"),
    _rule(rf"[A-Za-z]\.(?!\s+(?:{_any([*STARTERS, *map(str.upper, STARTERS)])})(?:\s|\Z))"),
    _rule(
        rf"(?:(?i:ph\.d|{_any(ABBREVIATIONS)})|(?:{_any(STATES)}|{_any([s.upper() for s in STATES])}))\.(?:-{ALNUM}+)*"
    ),
    _rule(rf"(?i:{_any(BEFORE_NUMBERS)})\.(?=\s*\d)"),
    _rule(rf"{ALNUM}+\.(?=[,;:])"),
    _rule(NUMBER),
    _rule(rf"[-+]?(?:\d{{1,4}}[- \u00a0])?\d{{1,4}}/\d{{1,4}}(?!\d)(?:[-/]?{ALNUM}+)*"),
    _rule(r"(?:\+?\d{1,3}[- ])?\(\d{3}\)[- ]?\d{3}[- ]\d{4}|\+\d{1,3} \d{3} \d{3} \d{4}", _brackets),
    _rule(r"[A-Z]+\$|\$"),
    _rule(rf"[<>]?[:;=][-o*']?(?:[()\\{{@|\[\]]|[DPdpO](?!{LETTER}))", _smiley),
    _rule(r":3|\^_\^"),
    _rule(r"\.{3,}|\.(?: \.)+|…", lambda text: ("...",)),
    _rule(r"-{2,}|[–—―‒]", lambda text: ("--",) if len(text) < 6 else (text,)),
    _rule(r"-|[!?]+|,|;|:"),
    _rule(r"``|''|[\"“”«»'‘’‛‹›`]", _nothing),
    _rule(r"&(?:amp|lt|gt|quot|apos|nbsp);", lambda text: tuple(filter(None, (ENTITIES[text],)))),
    _rule(r"&#\d+;"),
    _rule(r"_+|\*+|[()\[\]{}]", _brackets),
    _rule(r">>|<<|#+|[½¼¾¢£€¤₠]", lambda text: (REPLACED.get(text, text),)),
)
PLAIN = re.compile(r"[a-z]+(?=[ \n]|\Z)")
SPACE = re.compile(r"(?:[^\S\n]|\ufe0f)+")


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each caption, without punctuation.

    The captions are one text of lines, as in COCO's evaluation: the next one's first letter decides whether a caption
    ends with an initial.
    """
    text = "\n".join(caption.replace("\n", " ") for caption in captions)
    lines: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        if text[position] == "\n":
            lines.append([])
            position += 1
        elif space := SPACE.match(text, position):
            position = space.end()
        else:
            position, tokens = _longest(text, position)
            kept = " ".join(token for token in tokens if token not in PUNCTUATION)
            lines[-1] += kept.split()  # a fraction (1 1/2) or a tag holds spaces, and counts as its words
    return lines


def _longest(text: str, position: int) -> tuple[int, tuple[str, ...]]:
    """Return (the end of the token at `position`, its forms)."""
    plain = PLAIN.match(text, position)
    if plain:
        return plain.end(), _word(plain.group())
    longest: re.Match[str] | None = None
    emit: Emit = _one
    for rule in RULES:
        found = rule.pattern.match(text, position)
        if found and found.end() > (longest.end() if longest else position):
            longest, emit = found, rule.emit
    if longest:
        end = longest.end(longest.lastindex or 0)
        return end, tuple(token.replace("\u00ad", "") for token in emit(text[position:end]))
    letter = text[position]
    return position + 1, (letter,) if letter < "\uffff" and letter.isprintable() else ()

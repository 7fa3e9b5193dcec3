"""Score answers to visual questions by the rules under which VQA accuracies are published.

| rule | normalizes the prediction | normalizes the answers | leaves one annotator out |
|---|---|---|---|
| `official` | where annotators disagree | where annotators disagree | yes |
| `script_2017` | always | where they disagree, punctuation only | yes |
| `harness` | always | always | yes |
| `simple` | case only | case only | no |

`official` is the test server's rule and that of GT-Vision-Lab/VQA's `vqaEval.py` since March 2021, as in big_vision's
`transfers/vqav2.py`. `script_2017` is the same script before: there "two" never equals ten times "two". `harness` is
lmms-eval's for TextVQA and OKVQA; `simple` is min(1, matches / 3), as in big_vision's `transfers/vqa.py`.
"""

import re
from collections.abc import Callable, Sequence

from evaluation.metrics.items import Predictions, References, Score, mean_score

ENOUGH = 3  # so many equal answers make a prediction right


def _words(text: str) -> list[str]:
    return text.split()


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate(_words("one two three four five six seven eight nine ten"), start=1)
}
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
# The contractions that are restored. A word with two apostrophes is restored from either one.
CONTRACTIONS = _words(
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've"
)
TWICE_CONTRACTED = _words(
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)
IRREGULAR = {  # of the script's list
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _without_one(word: str) -> list[str]:
    """Return the word without its first, and without its second apostrophe."""
    first = word.index("'")
    second = word.index("'", first + 1)
    return [word[:first] + word[first + 1 :], word[:second] + word[second + 1 :]]


RESTORED = (
    {word.replace("'", ""): word for word in CONTRACTIONS}
    | {short: word for word in TWICE_CONTRACTED for short in _without_one(word)}
    | IRREGULAR
)


def vqa_accuracy(predictions: Predictions, references: References, rule: str = "official") -> Score:
    """Return the mean accuracy of the answers, in [0, 1], by one of RULES; references are all annotators' answers.

    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    return mean_score(predictions, references, RULES[rule])


def official(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer, normalized only where the annotators disagree."""
    prediction, answers = _trimmed(prediction), [_trimmed(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalized(prediction), [normalized(answer) for answer in answers]
    return leave_one_out(prediction, answers)


def script_2017(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer as the script computed it until 2021."""
    if len(set(answers)) > 1:
        answers = [_without_punctuation(answer) for answer in answers]
    return leave_one_out(normalized(_trimmed(prediction)), answers)


def harness(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer, with prediction and answers always normalized."""
    return leave_one_out(_processed(prediction), [_processed(answer) for answer in answers])


def simple(prediction: str, answers: Sequence[str]) -> float:
    """Return min(1, equal answers / 3), without regard to case."""
    return min(1.0, sum(answer.lower() == prediction.lower() for answer in answers) / ENOUGH)


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "official": official,
    "script_2017": script_2017,
    "harness": harness,
    "simple": simple,
}


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, equal answers of the others / 3).

    A single answer leaves no others: then the score is 1 where the prediction equals it.
    """
    if len(answers) == 1:
        return float(prediction == answers[0])
    equal = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / ENOUGH) for own in equal) / len(equal)


def normalized(text: str) -> str:
    """Return the text without punctuation and articles, with digits for number words and apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Delete marks next to a space, and all of them where a comma lies between digits; put spaces for the others."""
    delete_all = DIGITS_AROUND_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete_all or next_to_space else " ")
    return PERIOD.sub("", result)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _processed(text: str) -> str:
    """Return the text as mmf's and lmms-eval's EvalAIAnswerProcessor does."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalized(_trimmed(words))

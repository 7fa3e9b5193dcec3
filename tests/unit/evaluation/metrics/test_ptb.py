"""Tokens of captions are those of Stanford's PTBTokenizer, whose output these are."""

import pytest

from evaluation.metrics.ptb import tokenize

CASES = {
    "A man's dog isn't \"happy\" (very), is it?": "a man 's dog is n't happy -lrb- very -rrb- is it",
    "They can't, won't and cannot; I'd've gone!": "they ca n't wo n't and can not i 'd 've gone !".replace(" !", ""),
    "Mr. J. Smith of the U.S. Army, Ph.D., at St. Louis Inc.": "mr. j. smith of the u.s. army ph.d. at st. louis inc.",
    "vitamin C. The end": "vitamin c the end",
    "state-of-the-art two-story T-shirt/jeans - and -- more": "state-of-the-art two-story t-shirt/jeans and more",
    "It's 10:30 p.m., $5.00 or £3; 50% & AT&T": "it 's 10:30 p.m. $ 5.00 or # 3 50 % & at&t",
    "rock 'n' roll, 'tis O'Neil's jack-o'-lantern": "rock 'n' roll 't is o'neil 's jack-o lantern",
    "No. 5, no. Five; 1,000 1/2 2 1/2 ½ 6'4\"": "no. 5 no five 1,000 1/2 2 1/2 1/2 6 4",
    # An address, a tag and a smiley are one token each; of a smiley's bracket the name stays.
    "www.shop.com a@b.com #fun @you <b>x</b> :-) wow!!!": "www.shop.com a@b.com #fun @you <b> x </b> :--rrb- wow !!!",
    "the '60s, 90's ... and… end.": "the '60s 90 's and end",
    "café naïve 日本語 हिन्दी": "café naïve 日本語 हिन्दी",
    "": "",
}


@pytest.mark.parametrize("caption", CASES)
def test_tokens(caption: str) -> None:
    assert " ".join(tokenize([caption])[0]) == CASES[caption]


def test_a_caption_is_a_line_and_the_next_one_may_end_an_initial() -> None:
    assert tokenize(["plan C.", "The plan", "two\nlines"]) == [["plan", "c"], ["the", "plan"], ["two", "lines"]]
    assert tokenize(["plan C.", "the plan"])[0] == ["plan", "c."]

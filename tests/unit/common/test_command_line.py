import pytest

from common.command_line import split_own
from data.digest import DigestConfig


def test_help_is_a_commands_own_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        split_own(["run.seed=1", "--help"], DigestConfig)
    assert not end.value.code and "\nsteps=1:2\n" in capsys.readouterr().out

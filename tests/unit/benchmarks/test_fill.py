"""How full the rows of the paper's mixture are; benchmarks/data.md has the numbers of more steps."""

from benchmarks.fill import FIRST, one_step
from tests.unit.conf.test_composition import composed


def test_rows_of_the_paper_are_full_and_every_rank_has_equally_many() -> None:
    data = composed("experiment=paper_3b", "weights.vit=null", "weights.mt5=null").data
    rows = (data.encoder_length, data.decoder_length, data.images_per_row)
    assert (data.global_batch_size, data.num_streams, rows, data.longest_target) == (
        FIRST.batch, FIRST.streams, FIRST.capacity, FIRST.longest_target,
    )  # fmt: skip
    fill, by_stream, _ = one_step(FIRST, data.pool_examples, 1.0, seed=0)
    assert fill[0] >= 0.97 and fill[1] >= 0.90
    assert set(by_stream.tolist()) == {1}

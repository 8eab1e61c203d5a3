"""How HSIC splits its work: pairs of row blocks into rounds, a batch into groups of items."""

import itertools

import pytest

host = pytest.importorskip("pyflow._host", reason="built in a checkout alone")


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 512, 513, 1000, 4096, 10_001])
def test_rounds_visit_every_pair_of_blocks_once(n):
    rounds = host.tournament(n)
    blocks = len(rounds[0])
    met = [pair for tiles in rounds for pair in tiles if pair[1] < blocks]
    assert sorted(met) == list(itertools.combinations_with_replacement(range(blocks), 2))
    for tiles in rounds[1:]:
        seats = [block for pair in tiles for block in pair if block < blocks]
        assert len(seats) == len(set(seats)), "two tiles of a round share a block"


def test_no_rows_have_no_rounds():
    assert host.tournament(0) == []


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("batch", [1, 7, 8, 300])
@pytest.mark.parametrize("size", [0, 1000, 1 << 20, 4 << 20, (4 << 20) + 1, 1 << 30])
def test_groups_fit_the_caches_and_large_batches_need_no_barriers(batch, size, threads):
    teams, items = host.gram_schedule(batch, size, threads)
    fits = size <= 4 << 20
    assert teams == (threads if batch >= 4 * threads and fits else 1)
    assert 1 <= items <= batch
    assert items == 1 or (teams == 1 and items * size <= 4 << 20)

"""Test that the work list covers every key once, within its static size, for any lengths."""

import pytest
import torch

from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule


def schedule(
    lengths: list[int], window: int | None = None, query_len: int = 1, max_num_seqs: int = 40
) -> tuple[DecodeWorkspace, list[tuple[int, ...]]]:
    workspace = DecodeWorkspace.allocate(
        max_num_seqs, 8, 4, 64, dtype=torch.float16, device="cpu", window=window,
        query_len=query_len,
    )  # fmt: skip
    build_decode_schedule(torch.tensor(lengths, dtype=torch.int32), workspace)
    return workspace, [tuple(item) for item in workspace.items.T.tolist()]


@pytest.mark.parametrize(
    "lengths",
    [[1], [0], [0, 0, 7], [256], [257], [100_000], [1] * 40, [0, 5000, 1, 300_000], [10_000] * 37],
)
@pytest.mark.parametrize("window", [None, 300, -300])
@pytest.mark.parametrize("query_len", [1, 4])
def test_items_cover_every_visible_key_once(
    lengths: list[int], window: int | None, query_len: int
) -> None:
    workspace, items = schedule(lengths, window, query_len)
    bound = len(lengths) + workspace.slots
    live = [item for item in items[:bound] if item[0] >= 0]
    assert items[: len(live)] == live, "live items come first"
    for seq, length in enumerate(lengths):
        mine = [item for item in live if item[0] == seq]
        first_item = live.index(mine[0])
        assert [item[3:] for item in mine] == [(first_item, len(mine))] * len(mine)
        assert live[first_item : first_item + len(mine)] == mine
        needed = 0
        if window is not None and window > 0:
            needed = max(0, length - query_len + 1 - window)
        elif window is not None:  # the first key of the first query's chunk
            needed = max(0, length - query_len) // -window * -window
        assert mine[0][1] <= needed and needed - mine[0][1] < workspace.config.block_n
        assert mine[-1][2] == length
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[2] == after[1] and before[2] > before[1]
        assert all(item[1] % workspace.config.block_n == 0 for item in mine)


def test_splits_follow_tokens_not_the_batch() -> None:
    workspace, items = schedule([64_000])
    alone = sum(item[0] >= 0 for item in items)
    assert alone > workspace.slots * 0.9
    _, items = schedule([64_000] + [100] * 30)
    beside = sum(item[0] == 0 for item in items)
    assert beside > workspace.slots * 0.9


@pytest.mark.parametrize("decodes", [0, 1, 3])
def test_rows_that_are_no_decodes_get_no_items(decodes: int) -> None:
    """Only the device knows how many rows are decodes; the list is that of those alone."""
    lengths = [700, 3, 90, 5000, 40]
    workspace, _ = schedule(lengths)
    build_decode_schedule(
        torch.tensor(lengths, dtype=torch.int32), workspace,
        num_decodes=torch.tensor([decodes], dtype=torch.int32),
    )  # fmt: skip
    bound = len(lengths) + workspace.slots
    found = [tuple(item) for item in workspace.items.T.tolist()][:bound]
    live = [item for item in found if item[0] >= 0]
    assert {item[0] for item in live} == set(range(decodes)) and found[: len(live)] == live
    if decodes:
        _, alone = schedule(lengths[:decodes])
        assert live == [item for item in alone[:bound] if item[0] >= 0]


def test_a_shorter_list_wipes_the_longer_one() -> None:
    workspace, _ = schedule([50_000, 1])
    build_decode_schedule(torch.tensor([3, 4], dtype=torch.int32), workspace)
    assert workspace.items[0, : 2 + workspace.slots].tolist() == [0, 1] + [-1] * workspace.slots

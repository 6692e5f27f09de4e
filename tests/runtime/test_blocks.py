"""The block manager under any order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zoo.runtime.blocks import BlockManager


class Blocks(RuleBasedStateMachine):
    """Sequences come, grow and go; the model is how many tokens each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(max_blocks=12, block_size=4)
        self.tokens: dict[int, int] = {}
        self.next = 0

    @rule(tokens=st.integers(1, 60), spare=st.integers(0, 5))
    def come(self, tokens: int, spare: int) -> None:
        self._allocate(self.next, tokens, spare)
        self.next += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.integers(0, 9), spare=st.integers(0, 2))
    def grow(self, data: st.DataObject, more: int, spare: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self._allocate(owner, self.tokens[owner] + more, spare)

    def _allocate(self, owner: int, tokens: int, spare: int) -> None:
        before, free = self.blocks.owned(owner), self.blocks.free_blocks
        missing = -(-tokens // 4) - len(before)
        new = self.blocks.allocate(owner, tokens, spare)
        if missing > 0 and missing + spare > free:
            assert new is None and self.blocks.owned(owner) == before and self.blocks.free_blocks == free
            return
        assert new is not None and len(new) == max(missing, 0)
        assert self.blocks.owned(owner) == before + new, "blocks that are held must keep their places"
        self.tokens[owner] = tokens

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.free(owner)
        del self.tokens[owner]
        assert self.blocks.owned(owner) == []

    @rule()
    def free_a_stranger(self) -> None:
        self.blocks.free("nobody")

    @invariant()
    def free_and_used_make_the_total(self) -> None:
        assert self.blocks.free_blocks + self.blocks.used_blocks == self.blocks.total_blocks == 11

    @invariant()
    def nobody_shares_a_block(self) -> None:
        owned = [block for owner in self.blocks.owners() for block in self.blocks.owned(owner)]
        assert len(owned) == len(set(owned)) and 0 not in owned and all(0 < block < 12 for block in owned)

    @invariant()
    def everybody_has_room(self) -> None:
        assert set(self.tokens) == set(self.blocks.owners())
        assert all(len(self.blocks.owned(owner)) * 4 >= tokens for owner, tokens in self.tokens.items())


TestBlocks = Blocks.TestCase


@given(st.integers(2, 40), st.integers(1, 8))
def test_every_block_but_the_reserved_one_can_be_owned(max_blocks: int, block_size: int) -> None:
    blocks = BlockManager(max_blocks, block_size)
    owned = blocks.allocate("all", (max_blocks - 1) * block_size)
    assert owned == list(range(1, max_blocks))
    assert blocks.allocate("more", 1) is None


def test_blocks_given_back_longest_ago_are_reused_first() -> None:
    blocks = BlockManager(max_blocks=6, block_size=1)
    for owner in "abcde":
        blocks.allocate(owner, 1)
    blocks.free("c")
    blocks.free("a")
    assert blocks.allocate("f", 2) == [3, 1]

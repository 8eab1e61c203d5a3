"""Drawn calls of centred Gram matrices."""

from __future__ import annotations

from ..calls import Call, Hand, drawer


@drawer
def center_gram(hand: Hand) -> Call:
    n = hand.one(3, 0, 1, 2, 17, 40)
    inplace = hand.one(False, False, True)
    gram = hand.tensor((*hand.shape(0, 2)[:2], n, n)[-3:], grad=False if inplace else None)
    return Call("center_gram", [gram], {"inplace": inplace})

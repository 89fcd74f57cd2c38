"""Keyed permutations of ``range(n)`` that cost no memory and no set-up.

Shuffling the tracks of a data set by position lets every worker compute the same order without
state: the element at position p is a function of (key, p).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*values: int) -> int:
    """Hash integers to 64 well-mixed bits (the finaliser of SplitMix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + value * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(position: int, size: int, key: int) -> int:
    """Return the element at ``position`` of the permutation of ``range(size)`` that ``key`` names.

    An unbalanced Feistel network over the next power of two; values beyond ``size`` are walked
    on until they fall inside (fewer than two steps on average).
    """
    if size <= 2:
        return position ^ (key & 1) if size == 2 else position
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (bits - low_bits)) - 1
    value = position
    while True:
        high, low = value >> low_bits, value & low_mask
        round_key = key
        for _ in range(_ROUNDS // 2):
            round_key = (round_key * 0xD1342543DE82EF95 + 1) & _MASK
            high ^= ((((low + 1) * round_key) & _MASK) >> 40) & high_mask
            round_key = (round_key * 0xD1342543DE82EF95 + 1) & _MASK
            low ^= ((((high + 1) * round_key) & _MASK) >> 40) & low_mask
        value = (high << low_bits) | low
        if value < size:
            return value

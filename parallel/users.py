"""For whom a move travels: who will use an operand, and whose work a result holds."""

from __future__ import annotations

from collections import defaultdict

from farspan.parallel.plan import Direction, Plan


def users(plan: Plan, direction: Direction) -> list[int]:
    """Of each move of a schedule a set of ranks, as the bits of a number.

    Of an operand those who use it where it arrives or further on; of a result those who have added to it by then.
    """
    schedule = plan.schedule(direction)
    moves, pieces = schedule.moves, schedule.pieces
    found = [0] * len(moves)
    at: dict[tuple[int, int], int] = defaultdict(int)  # by rank and block, who uses the block there or further on
    for piece in pieces:
        for block in piece.q + piece.kv:
            at[piece.rank, block] |= 1 << piece.rank
    operands = [number for number, move in enumerate(moves) if not move.home]
    for number in sorted(operands, key=lambda number: -moves[number].start):
        move = moves[number]
        found[number] = at[move.dst, move.block]
        at[move.src, move.block] |= found[number]

    added: dict[tuple[int, int], int] = defaultdict(int)  # by rank and block, whose work is in the sum there
    arriving: list[list[int]] = [[] for _ in range(schedule.stages)]
    leaving: list[list[int]] = [[] for _ in range(schedule.stages)]
    computed: list[list[tuple[int, int]]] = [[] for _ in range(schedule.stages)]
    for number, move in enumerate(moves):
        if move.home:
            leaving[move.start].append(number)
            arriving[move.stop].append(number)
    for piece in pieces:
        computed[piece.stage] += [(piece.rank, block) for block in piece.q + piece.kv]
    for stage in range(schedule.stages):
        for number in arriving[stage]:
            added[moves[number].dst, moves[number].block] |= found[number]
        for number in leaving[stage]:
            found[number] = added.pop((moves[number].src, moves[number].block), 0)
        for rank, block in computed[stage]:
            added[rank, block] |= 1 << rank
    return found

"""How the work of `decode_warp` is shared: how many runs there are, how many on a multiprocessor."""

import functools

import torch
import triton

WARPS = 8  # on a multiprocessor: with the most registers, and enough to fill it
REGISTERS = 65536 // 32 // WARPS - 1  # of a lane
SCHEDULERS = 4  # of a multiprocessor
CPU_SHARED_BYTES = 99 << 10  # in the interpreter


def shared_bytes(device: torch.device) -> int:
    """Shared memory of a multiprocessor, of which each program takes 1 KiB more than it asks for."""
    if device.type == "cpu":
        return CPU_SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor) - 1024


@functools.cache
def best_splits(groups: int, tiles: int, schedulers: int, most: int, longest: int) -> int:
    """How many runs of `tiles` take the least time, with room for `most` programs on a scheduler.

    None is longer than `longest` tiles.

    In units of what a scheduler takes for a tile: with one program it waits for memory, with more it does
    not; a program's start and end are a tile more, and splits add to the reduction.
    """

    def cost(splits: int) -> float:
        programs = -(-groups * splits // schedulers)
        if programs > most:  # some wait for others to end
            programs = -(-programs // most) * most
        return max(programs, 1.2) * (-(-tiles // splits) + 1) + splits / 200

    least = -(-tiles // longest)
    return min(range(least, max(least, min(tiles, 4 * most * schedulers // groups)) + 1), key=cost)


def share(
    groups: int, tiles: int, others: int, longest: int, shared: int, sms: int, device: torch.device
) -> tuple[int, int]:
    """(splits, spare): runs of the `tiles` of each of `groups` programs, and shared memory to ask for.

    A program needs `shared` bytes, and takes `longest` tiles at most. `others` are short programs of the
    same launch.
    """
    available = shared_bytes(device)
    warps = min(WARPS, available // (shared + 1024))
    splits = best_splits(groups, tiles, SCHEDULERS * sms, -(-warps // SCHEDULERS), longest)
    # As much shared memory as leaves room for no more programs on a multiprocessor than its share: started
    # early, they fill some before they go to others. The others count, or runs would wait for their places.
    programs = min(warps, triton.cdiv(groups * splits + others, sms))
    return splits, available // programs - 1024 - shared

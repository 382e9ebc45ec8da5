"""Large files as the operating system likes them: prefetched, preallocated, flushed early, cloned.

What a system does not know is left out, but for writing itself; nothing here changes what is read
or written.
"""

from __future__ import annotations

import errno
import fcntl
import os

from poolreg import faults

MAX_THREADS = 16  # more only wait for memory and disk
_CLONE = 0x40049409  # FICLONE of Linux: <linux/fs.h>


def prefetch(descriptor: int, offset: int, length: int) -> None:
    """Let the system begin to read a range that is needed soon, unless it begins in memory."""
    if not hasattr(os, "RWF_NOWAIT"):
        return
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or cannot tell
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def allocate(descriptor: int, size: int) -> None:
    """Give a file its length and, where the system can, its blocks: a full disk fails now."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data` at `offset`, and let the system begin to bring it to the disk.

    The flush at the end then waits for little: without this it would start only there.
    """
    view, at = data.cast("B"), offset
    while view:
        faults.step("disk.write")
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
    if hasattr(os, "posix_fadvise"):
        # Said of pages that are not on the disk yet, it starts to write them and keeps them.
        os.posix_fadvise(descriptor, offset, at - offset, os.POSIX_FADV_DONTNEED)


def clone(source: int, target: int) -> bool:
    """Make an empty file share the blocks of another, copied on write; tell whether it does.

    XFS, Btrfs and ZFS can, ext4 cannot. Whatever happens to one file later, the other keeps.
    """
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError:
        return False
    return True

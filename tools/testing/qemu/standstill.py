# SPDX-License-Identifier: GPL-2.0
"""Stops all CPUs of a machine that QEMU emulates, many times per second.

QEMU stops all other CPUs for a locked operation on an unaligned address. When they
continue, guests of KVM in such a machine may fail: VMRUN may deliver an injected
interrupt twice.
"""

import ctypes
import mmap
import threading
import time

# lock incq (%rdi); ret
LOCKED_INC = bytes.fromhex("f048ff07c3")


def _address(area):
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def standstills(rate):
    """Starts `rate` stops per second, until the program ends."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=prot)
    code.write(LOCKED_INC)
    words = mmap.mmap(-1, 2 * mmap.PAGESIZE)

    def run(code, words):
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_address(code))
        across = _address(words) + mmap.PAGESIZE - 4
        while True:
            call(across)
            time.sleep(1 / rate)

    threading.Thread(target=run, args=(code, words), daemon=True).start()

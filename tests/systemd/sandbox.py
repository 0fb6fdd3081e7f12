"""Start a command as the shipped unit would: its system call filter, its address families, no W+X memory.

    python sandbox.py '{"calls": [...], "families": [...]}' COMMAND ARGUMENT…

Both survive execve, so the command lives under them from its first instruction. Exit code 75: this kernel or this
machine cannot. What is not allowed fails with EPERM, as SystemCallErrorNumber=EPERM says.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys

PR_SET_NO_NEW_PRIVS = 38
PR_SET_MDWE = 65
PR_MDWE_REFUSE_EXEC_GAIN = 1
ACT_ALLOW = 0x7FFF0000
ACT_EPERM = 0x00050000 | errno.EPERM
CMP_EQ = 4
CANNOT = 75


class ArgCmp(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def forbid_writable_code() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0
    ):
        print("no PR_SET_MDWE on this kernel", file=sys.stderr)
        sys.exit(CANNOT)


def filter_calls(calls: list[str], families: list[int]) -> None:
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        print("no libseccomp", file=sys.stderr)
        sys.exit(CANNOT)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    made = ctypes.c_void_p(seccomp.seccomp_init(ACT_EPERM))
    for name in calls:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # not of this architecture
        if name == "socket":
            for family in families:
                rule = ArgCmp(0, CMP_EQ, family, 0)
                check(seccomp.seccomp_rule_add_array(made, ACT_ALLOW, number, 1, ctypes.byref(rule)))
        else:
            check(seccomp.seccomp_rule_add_array(made, ACT_ALLOW, number, 0, None))
    check(seccomp.seccomp_load(made))


def check(result: int) -> None:
    if result:
        print(f"seccomp: {os.strerror(-result)}", file=sys.stderr)
        sys.exit(CANNOT)


def main() -> None:
    rules = json.loads(sys.argv[1])
    forbid_writable_code()
    filter_calls(rules["calls"], rules["families"])
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()

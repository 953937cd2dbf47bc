"""seccomp: the kernel refuses system calls by which a process reaches beyond itself.

A list of what is refused, unlike all others here: which calls Python, jax and torch make changes
with their versions and with the C library, and a call missed on a list of what is allowed would
refuse honest kernels on somebody else's machine.
"""

import errno
import os
from typing import Any

_REFUSED = (
    # The network, UDP and Unix sockets too; io_uring would do the same unseen.
    "socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg",
    "sendmmsg", "recvfrom", "recvmsg", "recvmmsg", "io_uring_setup", "io_uring_enter",
    "io_uring_register",
    # Other programs, other processes.
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "process_madvise", "rt_sigqueueinfo",
    "rt_tgsigqueueinfo", "tkill", "migrate_pages", "move_pages",
    # Namespaces, mounts, and the system itself.
    "unshare", "setns", "chroot", "pivot_root", "mount", "umount2", "mount_setattr", "move_mount",
    "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "open_by_handle_at", "swapon",
    "swapoff", "reboot", "kexec_load", "kexec_file_load", "init_module", "finit_module",
    "delete_module", "acct", "quotactl", "sethostname", "setdomainname", "settimeofday",
    "clock_settime", "clock_adjtime", "adjtimex", "syslog", "personality", "ioperm", "iopl",
    "bpf", "perf_event_open", "userfaultfd", "fanotify_init", "lookup_dcookie", "vhangup",
    "add_key", "request_key", "keyctl", "mq_open", "shmget", "semget", "msgget",
    # Metadata of files, which Landlock leaves free.
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime",
    "utimes", "utimensat", "futimesat", "setxattr", "lsetxattr", "fsetxattr", "removexattr",
    "lremovexattr", "fremovexattr", "mknod", "mknodat",
    # The limits themselves.
    "setrlimit", "setpriority", "sched_setaffinity", "ioprio_set", "capset", "setuid", "setgid",
    "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid",
)  # fmt: skip

_EVERYWHERE = {"socket", "connect", "execve", "ptrace", "setrlimit", "unshare", "clone3"}
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1


def library() -> Any:
    """The module that speaks to libseccomp.

    To be called before files are given up: it looks for the library by running a program.

    Raises:
        OSError: where it or libseccomp is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise OSError(
            f"libseccomp cannot be used ({error}); install it (Debian: libseccomp2) and pyseccomp"
        ) from error
    return pyseccomp


def restrict(library: Any, *, may_fork: bool) -> None:
    """Have the kernel refuse the calls above, to all threads there are and will be.

    Args:
        may_fork: leave starting processes, and programs in them, allowed.

    Raises:
        OSError: where the kernel refuses.
    """
    refuse, Arg = library.ERRNO(errno.EPERM), library.Arg
    rules = library.SyscallFilter(library.ALLOW)
    rules.set_attr(library.Attr.CTL_TSYNC, 1)
    names = set(_REFUSED) - ({"execve", "execveat"} if may_fork else set())
    if not may_fork:
        names |= {"fork", "vfork"}
    for name in sorted(names):
        _refuse(rules, refuse, name)
    if not may_fork:
        rules.add_rule(refuse, "clone", Arg(0, library.MASKED_EQ, _CLONE_THREAD, 0))
        # Its arguments lie in memory, where a filter cannot look. The C library falls back.
        _refuse(rules, library.ERRNO(errno.ENOSYS), "clone3")
        for name in ("kill", "tgkill"):
            rules.add_rule(refuse, name, Arg(0, library.NE, os.getpid()))
    # Reading a limit and setting one are the same call.
    rules.add_rule(refuse, "prlimit64", Arg(2, library.NE, 0))
    rules.add_rule(refuse, "prctl", Arg(0, library.EQ, _PR_SET_PDEATHSIG))
    rules.load()


def _refuse(rules: Any, action: int, name: str) -> None:
    try:
        rules.add_rule(action, name)
    except (OSError, ValueError):
        # Many calls are unknown to some architecture or version of libseccomp; not these.
        if name in _EVERYWHERE:
            raise

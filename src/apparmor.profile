# What Slipway's containers may do under AppArmor unless they name a profile of their own (RuntimeDefault):
# everything that files, capabilities and namespaces allow them, except to mount, to reconfigure the kernel
# through /proc and /sys, and to reach processes outside of the profile.
# Without includes: it loads where AppArmor's abstractions are not installed.

profile slipway-default flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  network,
  unix,
  umount,

  # Signals come from the runtime and from each other, and go only to each other.
  signal (receive) peer=unconfined,
  signal (receive) set=(exists),
  signal (send, receive) peer=slipway-default,
@RUNTIME@
  # Debuggers on the node may look in; from inside, only at each other.
  ptrace (readby, tracedby),
  ptrace (read, trace) peer=slipway-default,

  deny mount,

  # The files of /proc itself, and what is below, but for processes.
  deny /proc/* w,
  deny /proc/[^1-9s]*/** w,
  deny /proc/s[^y]*/** w,
  deny /proc/sy[^s]*/** w,
  # Sysctls of System V shared memory belong to the pod's IPC namespace; all others are out of bounds.
  deny /proc/sys/[^k]** w,
  deny /proc/sys/k[^e]** w,
  deny /proc/sys/kernel/[^s]** w,
  deny /proc/sys/kernel/s[^h]** w,
  deny /proc/sys/kernel/sh[^m]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,

  # Of /sys, only cgroups: whether they are writable their mount decides.
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/fs/cg[^r]** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}

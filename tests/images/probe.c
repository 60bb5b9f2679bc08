/* What a process in a container is and may do, told in plain lines: "key value...".
 * Linked statically into the test images; the black-box tests read its output. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static const char *error_name(long result, int error) {
    return result >= 0 ? "OK" : strerrorname_np(error);
}

static void namespaces(void) {
    const char *names[] = {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        char path[64], target[64];
        snprintf(path, sizeof path, "/proc/self/ns/%s", names[i]);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n > 0) printf("ns.%s %.*s\n", names[i], (int)n, target);
    }
}

static void descriptors(void) {
    DIR *dir = opendir("/proc/self/fd");
    if (!dir) return;
    struct dirent *entry;
    while ((entry = readdir(dir))) {
        char path[300], target[512];
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(dir)) continue;
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n > 0) printf("fd.%s %.*s\n", entry->d_name, (int)n, target);
    }
    closedir(dir);
}

static void limits(void) {
    const struct { const char *name; int id; } all[] = {
        {"nofile", RLIMIT_NOFILE}, {"core", RLIMIT_CORE}, {"nproc", RLIMIT_NPROC},
        {"memlock", RLIMIT_MEMLOCK}, {"stack", RLIMIT_STACK},
    };
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
        struct rlimit limit;
        if (getrlimit(all[i].id, &limit) == 0)
            printf("rlimit.%s %llu %llu\n", all[i].name, (unsigned long long)limit.rlim_cur,
                   (unsigned long long)limit.rlim_max);
    }
}

static int status(int argc, char **argv) {
    char line[4096], cwd[4096], host[256];
    printf("ids %d %d %d %d\n", getuid(), geteuid(), getgid(), getegid());
    for (int i = 0; i < argc; i++) printf("arg.%d %s\n", i, argv[i]);
    for (char **e = environ; *e; e++) printf("env %s\n", *e);
    if (getcwd(cwd, sizeof cwd)) printf("cwd %s\n", cwd);
    if (gethostname(host, sizeof host) == 0) printf("hostname %s\n", host);
    mode_t mask = umask(0);
    umask(mask);
    printf("umask %04o\n", mask);
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file)) {
        const char *wanted[] = {"Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:",
                                "Seccomp:", "Seccomp_filters:", "SigBlk:", "SigIgn:"};
        for (unsigned i = 0; i < sizeof wanted / sizeof *wanted; i++) {
            size_t n = strlen(wanted[i]);
            if (strncmp(line, wanted[i], n)) continue;
            char *value = line + n;
            while (*value == '\t' || *value == ' ') value++;
            printf("%.*s %s", (int)n - 1, wanted[i], value);
        }
    }
    if (file) fclose(file);
    file = fopen("/proc/self/oom_score_adj", "r");
    if (file && fgets(line, sizeof line, file)) printf("oom_score_adj %s", line);
    if (file) fclose(file);
    limits();
    namespaces();
    descriptors();
    return 0;
}

static void tell(const char *name, long result) {
    printf("%s %s\n", name, error_name(result, errno));
    fflush(stdout);
}

/* Runs `call` in a child, so that its effects (and its death) stay there; prints what came of it. */
#define TRY(name, call)                                              \
    do {                                                             \
        fflush(stdout);                                              \
        pid_t pid = fork();                                          \
        if (pid == 0) {                                              \
            errno = 0;                                               \
            tell(name, (long)(call));                                \
            _exit(0);                                                \
        }                                                            \
        int how = 0;                                                 \
        if (pid < 0) tell(name ".fork", -1);                         \
        else if (waitpid(pid, &how, 0) == pid && WIFSIGNALED(how))   \
            printf("%s SIGNAL %d\n", name, WTERMSIG(how));           \
    } while (0)

/* A child made by clone must end by itself; the parent reaps it. */
static long clone_with(unsigned long flags) {
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    if (pid > 0) waitpid((pid_t)pid, NULL, 0);
    return pid;
}

static long clone3_with(unsigned long flags) {
    struct clone_args args = {.flags = flags, .exit_signal = SIGCHLD};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) _exit(0);
    if (pid > 0) waitpid((pid_t)pid, NULL, 0);
    return pid;
}

static int syscalls(void) {
    /* Some of these work where nothing confines us: never outside a test image. */
    if (access("/etc/probe-image", F_OK) != 0) {
        fputs("probe: no /etc/probe-image: this is not a test image\n", stderr);
        return 2;
    }
    TRY("getpid", getpid());
    TRY("clone", clone_with(0));
    TRY("clone.newuser", clone_with(CLONE_NEWUSER));
    TRY("clone.newns", clone_with(CLONE_NEWNS));
    TRY("clone.newnet", clone_with(CLONE_NEWNET));
    TRY("clone.newpid", clone_with(CLONE_NEWPID));
    TRY("clone.newcgroup", clone_with(CLONE_NEWCGROUP));
    TRY("clone3", clone3_with(0));
    TRY("clone3.newuser", clone3_with(CLONE_NEWUSER));
    TRY("unshare.newuser", unshare(CLONE_NEWUSER));
    TRY("unshare.newns", unshare(CLONE_NEWNS));
    TRY("setns", setns(-1, 0));
    TRY("mount", mount("none", "/tmp", "tmpfs", 0, ""));
    TRY("umount", umount2("/tmp", 0));
    TRY("pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
    TRY("open_tree", syscall(SYS_open_tree, -1, "", 0));
    TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    TRY("keyctl", syscall(SYS_keyctl, 0, -3, 0));
    TRY("add_key", syscall(SYS_add_key, "user", "x", "y", 1, -3));
    TRY("bpf", syscall(SYS_bpf, 0, 0, 0));
    TRY("perf_event_open", syscall(SYS_perf_event_open, 0, 0, -1, -1, 0));
    TRY("userfaultfd", syscall(SYS_userfaultfd, 0));
    TRY("io_uring_setup", syscall(SYS_io_uring_setup, 0, 0));
    TRY("init_module", syscall(SYS_init_module, 0, 0, 0));
    TRY("delete_module", syscall(SYS_delete_module, "none", 0));
    TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0));
    TRY("reboot", syscall(SYS_reboot, 0, 0, 0, 0));
    TRY("settimeofday", syscall(SYS_settimeofday, 0, 0));
    TRY("swapoff", syscall(SYS_swapoff, "/none"));
    TRY("syslog", syscall(SYS_syslog, 10, 0, 0));
    TRY("quotactl", syscall(SYS_quotactl, 0, 0, 0, 0));
    TRY("acct", syscall(SYS_acct, "/none"));
    TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, -1, 0, 0));
    TRY("ptrace", ptrace(PTRACE_TRACEME, 0, 0, 0));
    TRY("personality.get", syscall(SYS_personality, 0xffffffffUL));
    TRY("personality.odd", syscall(SYS_personality, 0x0040000UL));
    TRY("chroot", chroot("/"));
    TRY("mknod", mknod("/tmp/.probe-null", S_IFCHR | 0600, 1 << 8 | 3) == 0 ? unlink("/tmp/.probe-null") : -1);
    TRY("chown", chown("/tmp", 0, 0));
    TRY("setuid0", setuid(0));
    TRY("sethostname", sethostname("probe", 5));
    TRY("socket.packet", socket(AF_PACKET, SOCK_RAW, 0));
    TRY("socket.vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
    TRY("socket.inet", socket(AF_INET, SOCK_STREAM, 0));
    return 0;
}

/* Opens the named files for writing and says what came of it. */
static int writable(int argc, char **argv) {
    for (int i = 0; i < argc; i++) {
        errno = 0;
        int file = open(argv[i], O_WRONLY);
        printf("%s %s\n", argv[i], error_name(file, errno));
    }
    return 0;
}

/* Writes numbered lines as fast as it can: "N xxx...", `count` of them. */
static int flood(long count, int width) {
    static char fill[65536];
    if (width < 0 || width >= (int)sizeof fill) return 2;
    memset(fill, 'x', (size_t)width);
    for (long i = 0; i < count; i++) printf("%ld %.*s\n", i, width, fill);
    return fflush(stdout) == 0 ? 0 : 1;
}

/* Takes memory, a mebibyte at a time, and touches it. */
static int eat(long mebibytes) {
    for (long i = 0; i < mebibytes; i++) {
        char *memory = malloc(1 << 20);
        if (!memory) return 3;
        memset(memory, (int)i | 1, 1 << 20);
    }
    puts("eaten");
    fflush(stdout);
    return 0;
}

/* Maps and touches so much in huge pages; says what came of it. */
static int huge(long mebibytes) {
    size_t size = (size_t)mebibytes << 20;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (memory == MAP_FAILED) {
        puts(error_name(-1, errno));
        return 0;
    }
    memset(memory, 1, size);
    puts("OK");
    return 0;
}

/* Waits for a signal, ignoring those named; exits with the number of the one that came. */
static int wait_signal(int argc, char **argv) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int signal = 0, ignored = 0;
        if (sigwait(&all, &signal) != 0) return 3;
        for (int i = 0; i < argc; i++) ignored |= atoi(argv[i]) == signal;
        printf("signal %d\n", signal);
        fflush(stdout);
        if (!ignored && signal != SIGCHLD) return signal;
    }
}

/* Leaves a process of a session of its own behind that keeps our descriptors; ends at once itself. */
static int leave_child(const char *argument) {
    pid_t pid = fork();
    if (pid < 0) return 3;
    if (pid == 0) {
        setsid();
        signal(SIGTERM, SIG_IGN);
        execlp("sleep", "sleep", argument, (char *)0);
        _exit(127);
    }
    printf("left %d\n", pid);
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "status";
    if (!strcmp(what, "status")) return status(argc, argv);
    if (!strcmp(what, "syscalls")) return syscalls();
    if (!strcmp(what, "writable")) return writable(argc - 2, argv + 2);
    if (!strcmp(what, "flood") && argc > 3) return flood(atol(argv[2]), atoi(argv[3]));
    if (!strcmp(what, "eat") && argc > 2) return eat(atol(argv[2]));
    if (!strcmp(what, "huge") && argc > 2) return huge(atol(argv[2]));
    if (!strcmp(what, "wait")) return wait_signal(argc - 2, argv + 2);
    if (!strcmp(what, "leave") && argc > 2) return leave_child(argv[2]);
    if (!strcmp(what, "exit") && argc > 2) return atoi(argv[2]);
    fprintf(stderr, "probe: status | syscalls | writable FILE... | flood COUNT WIDTH | eat MIB | huge MIB | wait [SIGNAL...] | "
                    "leave SECONDS | exit CODE\n");
    return 2;
}

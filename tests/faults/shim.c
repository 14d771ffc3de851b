/* Kills the process, or lets the system say no, at the n-th call that changes files below a folder.
 *
 * Loaded with LD_PRELOAD; does nothing until faults_arm is called. Built by shim.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES = 1, SYNCS = 2, NAMES = 4, READS = 8 };

static char folder[PATH_MAX];
static size_t folder_length;
static int classes, error_number, is_after, is_lasting;
static long wanted;
static atomic_long seen;
static atomic_int armed;

/* classes: which calls count. at: the number, from 1, of the call that fails; 0: none. error: what it fails with; 0:
 * the process is killed, before the call, or with after right behind it. lasting: all later calls fail too. */
void faults_arm(const char *below, int which, long at, int error, int after, int lasting) {
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    classes = which, wanted = at, error_number = error, is_after = after, is_lasting = lasting;
    atomic_store(&seen, 0);
    atomic_store(&armed, 1);
}

long faults_seen(void) { return atomic_load(&seen); }

static int is_below(const char *path) {
    char whole[PATH_MAX];
    if (path == NULL) return 0;
    if (path[0] != '/') {
        if (getcwd(whole, sizeof whole) == NULL) return 0;
        path = whole;
    }
    return strncmp(path, folder, folder_length) == 0;
}

static int is_open_below(int handle) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* 1: the call must fail, errno is set. *kill_after: it is to be made, and then the process ends. */
static int fails(int class, int counts, int *kill_after) {
    *kill_after = 0;
    if (!(class & classes) || !counts) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (wanted <= 0 || number < wanted || (number > wanted && !is_lasting)) return 0;
    if (error_number) {
        errno = error_number;
        return 1;
    }
    if (is_after) *kill_after = 1;
    else kill(getpid(), SIGKILL);
    return 0;
}

#define REAL(name, type, parameters) \
    static type (*real) parameters; \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, name);

#define GUARDED(class, counts, type, call) \
    int kill_after = 0; \
    if (atomic_load(&armed) && fails(class, counts, &kill_after)) return -1; \
    type result = call; \
    if (kill_after) kill(getpid(), SIGKILL); \
    return result;

ssize_t write(int h, const void *b, size_t n) {
    REAL("write", ssize_t, (int, const void *, size_t))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, b, n))
}
ssize_t pwrite(int h, const void *b, size_t n, off_t o) {
    REAL("pwrite", ssize_t, (int, const void *, size_t, off_t))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, b, n, o))
}
ssize_t pwrite64(int h, const void *b, size_t n, off64_t o) {
    REAL("pwrite64", ssize_t, (int, const void *, size_t, off64_t))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, b, n, o))
}
ssize_t writev(int h, const struct iovec *v, int n) {
    REAL("writev", ssize_t, (int, const struct iovec *, int))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, v, n))
}
ssize_t pwritev(int h, const struct iovec *v, int n, off_t o) {
    REAL("pwritev", ssize_t, (int, const struct iovec *, int, off_t))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, v, n, o))
}
ssize_t copy_file_range(int i, off64_t *io, int h, off64_t *oo, size_t n, unsigned f) {
    REAL("copy_file_range", ssize_t, (int, off64_t *, int, off64_t *, size_t, unsigned))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(i, io, h, oo, n, f))
}
ssize_t sendfile(int h, int i, off_t *o, size_t n) {
    REAL("sendfile", ssize_t, (int, int, off_t *, size_t))
    GUARDED(WRITES, is_open_below(h), ssize_t, real(h, i, o, n))
}
int ftruncate(int h, off_t n) {
    REAL("ftruncate", int, (int, off_t))
    GUARDED(WRITES, is_open_below(h), int, real(h, n))
}
int ftruncate64(int h, off64_t n) {
    REAL("ftruncate64", int, (int, off64_t))
    GUARDED(WRITES, is_open_below(h), int, real(h, n))
}
int fsync(int h) {
    REAL("fsync", int, (int))
    GUARDED(SYNCS, is_open_below(h), int, real(h))
}
int fdatasync(int h) {
    REAL("fdatasync", int, (int))
    GUARDED(SYNCS, is_open_below(h), int, real(h))
}
int rename(const char *a, const char *b) {
    REAL("rename", int, (const char *, const char *))
    GUARDED(NAMES, is_below(b), int, real(a, b))
}
int renameat(int d, const char *a, int e, const char *b) {
    REAL("renameat", int, (int, const char *, int, const char *))
    GUARDED(NAMES, is_below(b), int, real(d, a, e, b))
}
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    REAL("renameat2", int, (int, const char *, int, const char *, unsigned))
    GUARDED(NAMES, is_below(b), int, real(d, a, e, b, f))
}
int link(const char *a, const char *b) {
    REAL("link", int, (const char *, const char *))
    GUARDED(NAMES, is_below(b), int, real(a, b))
}
int symlink(const char *a, const char *b) {
    REAL("symlink", int, (const char *, const char *))
    GUARDED(NAMES, is_below(b), int, real(a, b))
}
int unlink(const char *a) {
    REAL("unlink", int, (const char *))
    GUARDED(NAMES, is_below(a), int, real(a))
}
int unlinkat(int d, const char *a, int f) {
    REAL("unlinkat", int, (int, const char *, int))
    GUARDED(NAMES, d == AT_FDCWD ? is_below(a) : is_open_below(d), int, real(d, a, f))
}
int mkdir(const char *a, mode_t m) {
    REAL("mkdir", int, (const char *, mode_t))
    GUARDED(NAMES, is_below(a), int, real(a, m))
}
int rmdir(const char *a) {
    REAL("rmdir", int, (const char *))
    GUARDED(NAMES, is_below(a), int, real(a))
}
ssize_t read(int h, void *b, size_t n) {
    REAL("read", ssize_t, (int, void *, size_t))
    GUARDED(READS, is_open_below(h), ssize_t, real(h, b, n))
}
ssize_t pread(int h, void *b, size_t n, off_t o) {
    REAL("pread", ssize_t, (int, void *, size_t, off_t))
    GUARDED(READS, is_open_below(h), ssize_t, real(h, b, n, o))
}
ssize_t pread64(int h, void *b, size_t n, off64_t o) {
    REAL("pread64", ssize_t, (int, void *, size_t, off64_t))
    GUARDED(READS, is_open_below(h), ssize_t, real(h, b, n, o))
}

static int opened_for_writing(int flags) { return (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY; }

#define MODE \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(more, mode_t) : 0; \
    va_end(more);

int open(const char *path, int flags, ...) {
    REAL("open", int, (const char *, int, ...))
    MODE
    GUARDED(NAMES, opened_for_writing(flags) && is_below(path), int, real(path, flags, mode))
}
int open64(const char *path, int flags, ...) {
    REAL("open64", int, (const char *, int, ...))
    MODE
    GUARDED(NAMES, opened_for_writing(flags) && is_below(path), int, real(path, flags, mode))
}
int openat(int d, const char *path, int flags, ...) {
    REAL("openat", int, (int, const char *, int, ...))
    MODE
    GUARDED(NAMES, opened_for_writing(flags) && is_below(path), int, real(d, path, flags, mode))
}
int openat64(int d, const char *path, int flags, ...) {
    REAL("openat64", int, (int, const char *, int, ...))
    MODE
    GUARDED(NAMES, opened_for_writing(flags) && is_below(path), int, real(d, path, flags, mode))
}

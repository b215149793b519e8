/* A disk that refuses writes: an LD_PRELOAD library, since a machine has no bad disk at hand.
 *
 * While the file REFUSING_SWITCH holds a number, every change below REFUSING_FOLDER fails with
 * that errno, and a byte is added to REFUSING_COUNT. Reading goes on, as from a page cache.
 * Memory that was mapped, and io_uring, are not watched.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int real_open(const char *path, int flags, mode_t mode) {
    static int (*found)(const char *, int, ...);
    if (!found) found = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    return found(path, flags, mode);
}

static ssize_t real_write(int fd, const void *data, size_t size) {
    static ssize_t (*found)(int, const void *, size_t);
    if (!found) found = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return found(fd, data, size);
}

/* The errno to refuse with now; 0: none. */
static int refusing(void) {
    const char *file = getenv("REFUSING_SWITCH");
    char text[16] = {0};
    int kept = errno, fd = file ? real_open(file, O_RDONLY | O_CLOEXEC, 0) : -1;
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
        close(fd);
    }
    errno = kept;
    return atoi(text);
}

static int below(const char *path) {
    const char *folder = getenv("REFUSING_FOLDER");
    size_t length = folder ? strlen(folder) : 0;
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int below_at(int dir, const char *path) {
    char link[64], whole[PATH_MAX];
    if (path && path[0] == '/') return below(path);
    if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t size = readlink(link, whole, sizeof whole - 1);
    if (size < 0) return 0;
    whole[size] = 0;
    return below(whole);
}

static int below_fd(int fd) { return below_at(fd, NULL); }

/* Whether to refuse a change; errno is set then. `space`: it needs none, so a full disk lets it. */
static int refuse(int there, int space) {
    int why = there ? refusing() : 0;
    if (!why || (why == ENOSPC && !space)) return 0;
    const char *file = getenv("REFUSING_COUNT");
    int fd = file ? real_open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (fd >= 0) {
        if (real_write(fd, ".", 1) != 1) abort();
        close(fd);
    }
    errno = why;
    return 1;
}

static int changes(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

#define OPEN(name)                                                         \
    int name(const char *path, int flags, ...) {                           \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                      \
        if (changes(flags) && refuse(below_at(AT_FDCWD, path), 0)) return -1; \
        REAL(name);                                                        \
        return real(path, flags, mode);                                    \
    }
#define OPENAT(name)                                                       \
    int name(int dir, const char *path, int flags, ...) {                  \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                      \
        if (changes(flags) && refuse(below_at(dir, path), 0)) return -1;   \
        REAL(name);                                                        \
        return real(dir, path, flags, mode);                               \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define CALL(type, name, declared, given, there, space) \
    type name declared {                                \
        if (refuse(there, space)) return -1;            \
        REAL(name);                                     \
        return real given;                              \
    }
CALL(ssize_t, write, (int fd, const void *d, size_t n), (fd, d, n), below_fd(fd), 1)
CALL(ssize_t, pwrite, (int fd, const void *d, size_t n, off_t o), (fd, d, n, o), below_fd(fd), 1)
CALL(ssize_t, pwrite64, (int fd, const void *d, size_t n, off64_t o), (fd, d, n, o), below_fd(fd), 1)
CALL(int, ftruncate, (int fd, off_t n), (fd, n), below_fd(fd), 0)
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n), below_fd(fd), 0)
CALL(int, fsync, (int fd), (fd), below_fd(fd), 0)
CALL(int, mkdir, (const char *p, mode_t m), (p, m), below_at(AT_FDCWD, p), 0)
CALL(int, unlink, (const char *p), (p), below_at(AT_FDCWD, p), 0)
CALL(int, rmdir, (const char *p), (p), below_at(AT_FDCWD, p), 0)
CALL(int, rename, (const char *a, const char *b), (a, b), below_at(AT_FDCWD, b), 0)

/* A disk that is full after a number of writes, for a process that has this before libc (LD_PRELOAD).
 * What makes files, writes to them, or brings them to the disk counts, on regular files alone; past
 * the limit it fails with ENOSPC. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long count, limit = LONG_MAX;

/* Let so many more writes pass; negative for as many as there come. */
void disk_room(long writes) { count = 0, limit = writes < 0 ? LONG_MAX : writes; }
/* Writes since then. */
long disk_writes(void) { return count; }

static int full(void) {
    if (atomic_fetch_add(&count, 1) < limit) return 0;
    errno = ENOSPC;
    return 1;
}

static int full_of(int file) {
    struct stat found;
    return fstat(file, &found) == 0 && S_ISREG(found.st_mode) && full();
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(type, name, parameters, ...)                                                        \
    type name parameters { return full_of(file) ? -1 : NEXT(name)(__VA_ARGS__); }
WRITES(ssize_t, write, (int file, const void *data, size_t size), file, data, size)
WRITES(ssize_t, writev, (int file, const struct iovec *data, int parts), file, data, parts)
WRITES(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), file, data, size, at)
WRITES(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), file, data, size, at)
WRITES(int, fsync, (int file), file)
WRITES(int, fdatasync, (int file), file)

#define OPENS(name)                                                                                \
    int name(const char *path, int flags, ...) {                                                   \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        const mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
        va_end(rest);                                                                              \
        return flags & O_CREAT && access(path, F_OK) && full() ? -1 : NEXT(name)(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

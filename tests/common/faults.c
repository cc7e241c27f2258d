/*
 * Injects faults of the disk, the clock and memory into a server that preloads this
 * library. The environment variable FAULTS names a file with the numbers of struct
 * faults. Every process maps it, so a change takes effect in all of them at once.
 *
 * Reads are those of user relations' files, and of the list by autoprewarm_blocks().
 * Writes are those of a new list, be it the server's own or the upstream server's. As on
 * a real disk, signals do not interrupt a delay. Memory is refused to the library, or to
 * all code of one process. Dynamic shared memory is short for the whole server.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FIRST_USER_FILE 16384
#define LIST "/autoprewarm.blocks"
#define NEW_LIST LIST ".tmp"
#define NEW_UPSTREAM_LIST "/autoprewarm.upstream.tmp"

/* The same as `Fault` in mod.rs. */
struct faults
{
	int64_t clock;			/* microseconds added to the time of day */
	int64_t uptime;			/* seconds added to the monotonic clock */
	int64_t read_delay;		/* milliseconds that a read takes */
	int64_t read_errors;	/* one of so many reads fails */
	int64_t list_end;		/* milliseconds that finding the end of the list takes */
	int64_t list_delay;		/* milliseconds that a write or rename of the list takes */
	int64_t flush_delay;	/* milliseconds that flushing the list takes */
	int64_t list_write;		/* the error number of writing the list */
	int64_t list_close;		/* the error number of closing it */
	int64_t list_flush;		/* the error number of flushing it */
	int64_t list_rename;	/* the error number of renaming it */
	int64_t refused_memory; /* one of so many memory requests of the library fails */
	int64_t limited_process;	/* the process whose memory is limited */
	int64_t memory_left;	/* bytes more than now that it can have */
	int64_t segment_size;	/* bytes that a segment of dynamic shared memory may have */
	int64_t segment_error;	/* what a larger one fails with */
};

static const struct faults none;
static const volatile struct faults *faults = &none;

__attribute__((constructor))
static void map_faults(void)
{
	const char *path = getenv("FAULTS");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *mapped;

	if (file < 0)
		return;
	mapped = mmap(NULL, sizeof(struct faults), PROT_READ, MAP_SHARED, file, 0);
	if (mapped != MAP_FAILED)
		faults = mapped;
	close(file);
}

/* The C library's function of that name. */
#define NEXT(name) \
	static __typeof__(name) *next; \
	if (!next) \
		next = (__typeof__(name) *) dlsym(RTLD_NEXT, #name)

static ssize_t path_of(int file, char *path, size_t room)
{
	char link[64];
	ssize_t length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
	length = readlink(link, path, room - 1);
	path[length < 0 ? 0 : length] = '\0';
	return length;
}

static int is_users(int file)
{
	char path[4096];
	unsigned database, number;
	const char *base;

	path_of(file, path, sizeof(path));
	base = strstr(path, "/base/");
	return base && sscanf(base, "/base/%u/%u", &database, &number) == 2 &&
		number >= FIRST_USER_FILE;
}

static int is_named(int file, const char *name)
{
	char path[4096];
	ssize_t length = path_of(file, path, sizeof(path));
	ssize_t end = strlen(name);

	return length >= end && strcmp(path + length - end, name) == 0;
}

static int is_new_list(int file)
{
	return is_named(file, NEW_LIST) || is_named(file, NEW_UPSTREAM_LIST);
}

static void delay(long milliseconds)
{
	struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};

	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &left, &left) == EINTR)
		;
}

/* Returns true randomly, once in so many calls. */
static int is_one_of(long many)
{
	static uint64_t state;
	static int process;
	uint64_t mixed;

	if (many <= 0)
		return 0;
	if (process != getpid())
		state = process = getpid();
	/* SplitMix64: processes with adjoining ids must not meet the same chances. */
	mixed = state += 0x9e3779b97f4a7c15;
	mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
	mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
	return (mixed ^ (mixed >> 31)) % many == 0;
}

/* Delays a read, and returns true if it must fail. */
static int bad_read(int file)
{
	int kept = errno;
	long milliseconds = faults->read_delay, errors = faults->read_errors;

	if ((milliseconds > 0 || errors > 0) && is_users(file))
	{
		delay(milliseconds);
		if (is_one_of(errors))
		{
			errno = EIO;
			return 1;
		}
	}
	errno = kept;
	return 0;
}

ssize_t pread(int file, void *into, size_t length, off_t offset)
{
	NEXT(pread);
	return bad_read(file) ? -1 : next(file, into, length, offset);
}

ssize_t pread64(int file, void *into, size_t length, off64_t offset)
{
	NEXT(pread64);
	ssize_t result = bad_read(file) ? -1 : next(file, into, length, offset);
	long milliseconds = faults->list_end;

	if (result == 0 && milliseconds > 0 && is_named(file, LIST))
		delay(milliseconds);
	return result;
}

ssize_t preadv(int file, const struct iovec *into, int count, off_t offset)
{
	NEXT(preadv);
	return bad_read(file) ? -1 : next(file, into, count, offset);
}

ssize_t preadv64(int file, const struct iovec *into, int count, off64_t offset)
{
	NEXT(preadv64);
	return bad_read(file) ? -1 : next(file, into, count, offset);
}

/* Whether a segment of dynamic shared memory is larger than one may be. */
static int is_too_large(int64_t size)
{
	if (faults->segment_size == 0 || size <= faults->segment_size)
		return 0;
	errno = faults->segment_error;
	return 1;
}

/* The server makes segments of type posix, sysv and mmap by these. */
int posix_fallocate(int file, off_t offset, off_t length)
{
	NEXT(posix_fallocate);
	return is_too_large(offset + length) ? errno : next(file, offset, length);
}

int posix_fallocate64(int file, off64_t offset, off64_t length)
{
	return posix_fallocate(file, offset, length);
}

int shmget(key_t key, size_t size, int flags)
{
	NEXT(shmget);
	return is_too_large(size) ? -1 : next(key, size, flags);
}

static int is_segment(int file)
{
	char path[4096];

	path_of(file, path, sizeof(path));
	return strstr(path, "/pg_dynshmem/") != NULL;
}

ssize_t write(int file, const void *from, size_t length)
{
	NEXT(write);
	long milliseconds = faults->list_delay, error = faults->list_write;

	if (faults->segment_size > 0 && is_segment(file) &&
		is_too_large(lseek(file, 0, SEEK_CUR) + length))
		return -1;

	if ((milliseconds > 0 || error > 0) && is_new_list(file))
	{
		/* Half of it is written before the delay or the error. */
		ssize_t half = length > 1 ? next(file, from, length / 2) : 0;

		delay(milliseconds);
		if (error == 0 && half > 0)
			return half;
		if (error > 0)
		{
			errno = error;
			return -1;
		}
	}
	return next(file, from, length);
}

int close(int file)
{
	NEXT(close);
	int kept = errno, error = faults->list_close;

	if (error > 0 && is_new_list(file))
	{
		next(file);
		errno = error;
		return -1;
	}
	errno = kept;
	return next(file);
}

int fsync(int file)
{
	NEXT(fsync);
	long milliseconds = faults->flush_delay, error = faults->list_flush;

	if ((milliseconds > 0 || error > 0) && is_new_list(file))
	{
		delay(milliseconds);
		if (error > 0)
		{
			errno = error;
			return -1;
		}
	}
	return next(file);
}

int fdatasync(int file)
{
	NEXT(fdatasync);
	long milliseconds = faults->flush_delay, error = faults->list_flush;

	if ((milliseconds > 0 || error > 0) && is_new_list(file))
	{
		delay(milliseconds);
		if (error > 0)
		{
			errno = error;
			return -1;
		}
	}
	return next(file);
}

int rename(const char *from, const char *to)
{
	NEXT(rename);

	if (strcmp(from, NEW_LIST + 1) == 0 || strcmp(from, NEW_UPSTREAM_LIST + 1) == 0)
	{
		delay(faults->list_delay);
		if (faults->list_rename > 0)
		{
			errno = faults->list_rename;
			return -1;
		}
	}
	return next(from, to);
}

/* Whether the code at `caller` is refused memory. */
static int is_refused(void *caller)
{
	Dl_info library;

	if (faults->refused_memory <= 0 || !dladdr(caller, &library) ||
		!strstr(library.dli_fname, "/pg_prewarm.so") ||
		!is_one_of(faults->refused_memory))
		return 0;
	errno = ENOMEM;
	return 1;
}

/* How much memory this process has allocated since it was limited. */
static int64_t taken;

static int is_too_much(size_t size)
{
	if (faults->limited_process == 0 || faults->limited_process != getpid() ||
		taken + (int64_t) size <= faults->memory_left)
		return 0;
	errno = ENOMEM;
	return 1;
}

/* Counts memory that was allocated (sign 1) or freed (sign -1). */
static void *count(void *memory, int sign)
{
	if (memory && faults->limited_process != 0 && faults->limited_process == getpid())
		taken += sign * (int64_t) malloc_usable_size(memory);
	return memory;
}

#define REFUSED(size) (is_refused(__builtin_return_address(0)) || is_too_much(size))

/* The C library's functions. Looking them up would allocate memory. */
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

void *malloc(size_t size)
{
	return REFUSED(size) ? NULL : count(__libc_malloc(size), 1);
}

void *calloc(size_t number, size_t size)
{
	return REFUSED(number * size) ? NULL : count(__libc_calloc(number, size), 1);
}

void *realloc(void *memory, size_t size)
{
	void *larger;

	if (REFUSED(size))
		return NULL;
	count(memory, -1);
	larger = __libc_realloc(memory, size);
	count(larger ? larger : memory, 1);
	return larger;
}

int posix_memalign(void **into, size_t alignment, size_t size)
{
	if (REFUSED(size))
		return ENOMEM;
	*into = count(__libc_memalign(alignment, size), 1);
	return *into ? 0 : ENOMEM;
}

void free(void *memory)
{
	count(memory, -1);
	__libc_free(memory);
}

/* Only the library's mappings are refused and counted. */
static int is_ours(void *caller)
{
	Dl_info library;

	return faults != &none && dladdr(caller, &library) &&
		strstr(library.dli_fname, "/pg_prewarm.so");
}

void *mmap(void *at, size_t length, int protection, int flags, int file, off_t offset)
{
	NEXT(mmap);
	int counts = (flags & MAP_ANONYMOUS) && is_ours(__builtin_return_address(0));
	void *mapped;

	if (counts && REFUSED(length))
		return MAP_FAILED;
	mapped = next(at, length, protection, flags, file, offset);
	if (counts && mapped != MAP_FAILED && faults->limited_process == getpid())
		taken += length;
	return mapped;
}

int munmap(void *at, size_t length)
{
	NEXT(munmap);
	int counts = is_ours(__builtin_return_address(0));
	int result = next(at, length);

	if (counts && result == 0 && faults->limited_process == getpid())
		taken -= length;
	return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
	NEXT(gettimeofday);
	int result = next(time, zone);
	int64_t microseconds = time->tv_sec * INT64_C(1000000) + time->tv_usec + faults->clock;

	time->tv_sec = microseconds / 1000000;
	time->tv_usec = microseconds % 1000000;
	return result;
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
	NEXT(clock_gettime);
	int result = next(clock, time);

	if (clock == CLOCK_REALTIME)
		time->tv_sec += faults->clock / 1000000;
	if (clock == CLOCK_MONOTONIC)
		time->tv_sec += faults->uptime;
	return result;
}

time_t time(time_t *into)
{
	NEXT(time);
	time_t now = next(NULL) + faults->clock / 1000000;

	if (into)
		*into = now;
	return now;
}

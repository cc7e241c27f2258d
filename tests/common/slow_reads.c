/*
 * Makes a server's disk slow: every read of a user relation's file takes so many
 * milliseconds as the file that SLOW_READS names says. Preloaded into the server.
 *
 * As in a read from a real disk, no signal cuts the time short.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FIRST_USER_FILE 16384

static int is_users(int file)
{
	char link[64], path[4096];
	unsigned database, number;
	const char *base;
	ssize_t length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
	length = readlink(link, path, sizeof(path) - 1);
	if (length < 0)
		return 0;
	path[length] = '\0';
	base = strstr(path, "/base/");
	return base && sscanf(base, "/base/%u/%u", &database, &number) == 2 &&
		number >= FIRST_USER_FILE;
}

static long milliseconds(void)
{
	char text[32] = "";
	const char *path = getenv("SLOW_READS");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	if (file >= 0)
	{
		if (read(file, text, sizeof(text) - 1) < 0)
			text[0] = '\0';
		close(file);
	}
	return atol(text);
}

static void delay(int file)
{
	int kept = errno;

	if (is_users(file))
	{
		struct timespec end;
		long time = milliseconds();

		clock_gettime(CLOCK_MONOTONIC, &end);
		end.tv_sec += time / 1000;
		end.tv_nsec += time % 1000 * 1000000;
		if (end.tv_nsec >= 1000000000)
		{
			end.tv_sec++;
			end.tv_nsec -= 1000000000;
		}
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR)
			;
	}
	errno = kept;
}

/* The next definition of a function of that name: the C library's own. */
#define NEXT(name) \
	static __typeof__(name) *next; \
	if (!next) \
		next = (__typeof__(name) *) dlsym(RTLD_NEXT, #name)

ssize_t pread(int file, void *into, size_t length, off_t offset)
{
	NEXT(pread);
	delay(file);
	return next(file, into, length, offset);
}

ssize_t pread64(int file, void *into, size_t length, off64_t offset)
{
	NEXT(pread64);
	delay(file);
	return next(file, into, length, offset);
}

ssize_t preadv(int file, const struct iovec *into, int count, off_t offset)
{
	NEXT(preadv);
	delay(file);
	return next(file, into, count, offset);
}

ssize_t preadv64(int file, const struct iovec *into, int count, off64_t offset)
{
	NEXT(preadv64);
	delay(file);
	return next(file, into, count, offset);
}

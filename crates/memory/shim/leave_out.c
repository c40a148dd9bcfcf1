/*
 * Loaded into criu (LD_PRELOAD): memory that is carried past CRIU disappears from what the kernel tells it, so that it
 * is left out of the dump. CRIU learns of private memory by ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap, or by reading that
 * file where the kernel has no such call, of shared memory by lseek(SEEK_DATA); the tar it starts for a tmpfs looks at a file's blocks, then uses lseek(SEEK_DATA), too.
 *
 * Besides, /proc/PID/smaps of some processes is a file beside the list (openat), and tracked connections are not asked
 * for (socket, at the end).
 *
 * Nothing is needed from libc but errno's place, so that it loads under any libc, and into any program: where the list
 * named by GODWIT_LEAVE_OUT does not exist or does not fit, every call does exactly what it does without this file.
 *
 * The list (see src/filter): words of 64 bits in the machine's order:
 *   magic, number of ranges, number of objects, bytes of a page,
 *   ranges:  process, start, end      sorted, not overlapping
 *   objects: device, inode, 1 for a SysV segment, which has its id for an inode
 */
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <sys/syscall.h>

typedef unsigned long word;
struct range { word pid, start, end; };
struct object { word device, inode, sysv; };
struct list { word magic, ranges, objects, page; };
struct region { word start, end, categories; };
struct scan { word size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned; };

#define MAGIC 0x3254554f57444f47UL /* "GODWOUT2" */
#define PAGEMAP_SCAN 0xc0606610UL
#define PAGE_IS_GUARD (1UL << 8)
#define SEEK_DATA 3
#define MAX_LIST_BYTES (64UL << 20)
#define ENXIO 6

extern int *__errno_location(void);
extern char **environ __attribute__((weak));

static word call6(word n, word a, word b, word c, word d, word e, word f)
{
#if defined(__x86_64__)
	word ret;
	register word r10 __asm__("r10") = d;
	register word r8 __asm__("r8") = e;
	register word r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
#elif defined(__aarch64__)
	register word x8 __asm__("x8") = n;
	register word x0 __asm__("x0") = a;
	register word x1 __asm__("x1") = b;
	register word x2 __asm__("x2") = c;
	register word x3 __asm__("x3") = d;
	register word x4 __asm__("x4") = e;
	register word x5 __asm__("x5") = f;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
#error "no system calls for this architecture"
#endif
}

#define CALL(n, a, b, c, d) call6(n, (word)(a), (word)(b), (word)(c), (word)(d), 0, 0)
#define FAILED(ret) ((word)(ret) > (word)-4096)

static long answer(word ret)
{
	if (FAILED(ret)) {
		*__errno_location() = (int)-ret;
		return -1;
	}
	return (long)ret;
}

static int starts_with(const char *text, const char *with)
{
	while (*with)
		if (*text++ != *with++)
			return 0;
	return 1;
}

static word parse(const char **text)
{
	word value = 0;
	while (**text >= '0' && **text <= '9' && value < 1UL << 32)
		value = value * 10 + (word)(*(*text)++ - '0');
	return value;
}

static const char *list_path(void)
{
	if (!&environ || !environ)
		return 0;
	for (char **e = environ; *e; e++)
		if (starts_with(*e, "GODWIT_LEAVE_OUT="))
			return *e + sizeof("GODWIT_LEAVE_OUT=") - 1;
	return 0;
}

/* The list, or null. Looked for until it is there: criu may be started before it is written. */
static const struct list *get_list(void)
{
	static const struct list *list;
	const char *path;
	word fd, bytes, at;
	const struct list *found;

	if (list)
		return list;
	path = list_path();
	if (!path)
		return 0;
	fd = CALL(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
	if (FAILED(fd))
		return 0;
	bytes = CALL(SYS_lseek, fd, 0, 2, 0);
	at = (word)-1;
	if (!FAILED(bytes) && bytes >= sizeof(*list) && bytes <= MAX_LIST_BYTES)
		at = call6(SYS_mmap, 0, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
	CALL(SYS_close, fd, 0, 0, 0);
	if (FAILED(at))
		return 0;
	found = (const struct list *)at;
	if (found->magic != MAGIC || found->ranges > MAX_LIST_BYTES || found->objects > MAX_LIST_BYTES || !found->page ||
	    bytes != sizeof(*found) + found->ranges * sizeof(struct range) + found->objects * sizeof(struct object)) {
		CALL(SYS_munmap, at, bytes, 0, 0);
		return 0;
	}
	return list = found;
}

/* What the descriptor is called; empty if that is not known. */
static void name_of(int fd, char *name, word size)
{
	char path[32] = "/proc/self/fd/", digits[12];
	int n = 0, at = sizeof("/proc/self/fd/") - 1;
	word length;

	do {
		digits[n++] = (char)('0' + fd % 10);
		fd /= 10;
	} while (fd > 0 && n < (int)sizeof(digits));
	while (n > 0)
		path[at++] = digits[--n];
	path[at] = 0;
	length = CALL(SYS_readlinkat, AT_FDCWD, path, name, size - 1);
	name[FAILED(length) ? 0 : length] = 0;
}

/* The process whose page map the descriptor is; 0 for anything else, and for one's own. */
static word process_of(int fd)
{
	char name[64];
	const char *rest = name + sizeof("/proc/") - 1;
	word pid;

	name_of(fd, name, sizeof(name));
	if (!starts_with(name, "/proc/"))
		return 0;
	pid = parse(&rest);
	if (!starts_with(rest, "/pagemap") || pid == CALL(SYS_getpid, 0, 0, 0, 0))
		return 0;
	return pid;
}

/* The first of the process's ranges that ends after address. */
static word first_range(const struct range *ranges, word count, word pid, word address)
{
	word low = 0, high = count;

	while (low < high) {
		word middle = low + (high - low) / 2;
		const struct range *r = &ranges[middle];
		if (r->pid < pid || (r->pid == pid && r->end <= address))
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Takes what is listed out of the count regions; a region can fall into several parts. The new count. */
static word leave_out(const struct list *list, word pid, struct scan *scan, word count)
{
	const struct range *ranges = (const struct range *)(list + 1);
	struct region *to = (struct region *)scan->vec, *from = to;
	word bytes = count * sizeof(*from), kept = 0, n, copy = 0;

	if (!count)
		return 0;
	copy = call6(SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, (word)-1, 0);
	if (FAILED(copy))
		return count;
	from = (struct region *)copy;
	for (n = 0; n < count; n++)
		from[n] = to[n];
	for (n = 0; n < count; n++) {
		word start = from[n].start, end = from[n].end;
		word at = first_range(ranges, list->ranges, pid, start);
		if (from[n].categories & PAGE_IS_GUARD)
			at = list->ranges;
		while (start < end) {
			int hit = at < list->ranges && ranges[at].pid == pid && ranges[at].start < end;
			word stop = hit ? ranges[at].start : end;
			if (start < stop) {
				if (kept == scan->vec_len) {
					/* No room: the caller asks again from here. */
					scan->walk_end = start;
					goto out;
				}
				to[kept].start = start;
				to[kept].end = stop;
				to[kept++].categories = from[n].categories;
			}
			start = hit ? (ranges[at].end > start ? ranges[at].end : start) : end;
			at++;
		}
	}
out:
	CALL(SYS_munmap, copy, bytes, 0, 0);
	return kept;
}

/* Whether all that is asked for is listed: then there is nothing to ask the kernel, which looks at every page. */
static int is_left_out(const struct list *list, word pid, const struct scan *scan)
{
	const struct range *ranges = (const struct range *)(list + 1);
	word at = first_range(ranges, list->ranges, pid, scan->start);

	/* Guard regions CRIU carries itself. It asks for them alone; in its other questions it skips them. */
	return scan->mask != PAGE_IS_GUARD && at < list->ranges && ranges[at].pid == pid &&
	       ranges[at].start <= scan->start && scan->end <= ranges[at].end;
}

int ioctl(int fd, unsigned long request, ...)
{
	__builtin_va_list arguments;
	word argument, ret, pid;
	const struct list *list;

	__builtin_va_start(arguments, request);
	argument = __builtin_va_arg(arguments, word);
	__builtin_va_end(arguments);
	pid = request == PAGEMAP_SCAN && ((struct scan *)argument)->vec ? process_of(fd) : 0;
	list = pid ? get_list() : 0;
	if (list && is_left_out(list, pid, (struct scan *)argument)) {
		((struct scan *)argument)->walk_end = ((struct scan *)argument)->end;
		return 0;
	}
	ret = CALL(SYS_ioctl, fd, request, argument, 0);
	if (list && !FAILED(ret))
		ret = leave_out(list, pid, (struct scan *)argument, ret);
	return (int)answer(ret);
}

/*
 * A kernel without PAGEMAP_SCAN: CRIU reads one word for each page (pmc_fill_cache in its pagemap-cache.c). Those of
 * listed pages say that nothing is there; the kernel is not asked for them.
 */
static long read_at(int fd, void *buffer, word bytes, long offset)
{
	word pid = process_of(fd), *entries = buffer, count = bytes / sizeof(word), done = 0, page, ret;
	const struct list *list = pid && !(offset % sizeof(word)) ? get_list() : 0;
	const struct range *ranges = (const struct range *)(list + 1);

	if (!list)
		return answer(CALL(SYS_pread64, fd, buffer, bytes, offset));
	page = (word)offset / sizeof(word);
	while (done < count) {
		word address = (page + done) * list->page, until = count;
		word at = first_range(ranges, list->ranges, pid, address);
		int hit = at < list->ranges && ranges[at].pid == pid, listed = hit && ranges[at].start <= address;
		word stop = !hit ? 0 : (listed ? ranges[at].end : ranges[at].start) / list->page - page;

		if (hit && stop < until)
			until = stop;
		if (listed) {
			while (done < until)
				entries[done++] = 0;
			continue;
		}
		ret = CALL(SYS_pread64, fd, entries + done, (until - done) * sizeof(word), offset + done * sizeof(word));
		if (FAILED(ret))
			return done ? (long)(done * sizeof(word)) : answer(ret);
		done += ret / sizeof(word);
		if (done < until)
			break;
	}
	return (long)(done * sizeof(word));
}

long pread(int fd, void *buffer, word bytes, long offset)
{
	return read_at(fd, buffer, bytes, offset);
}

long pread64(int fd, void *buffer, word bytes, long offset)
{
	return read_at(fd, buffer, bytes, offset);
}

/* Whether the file is a listed object. */
static int is_listed(const struct list *list, int fd, word device, word inode)
{
	const struct object *objects =
		(const struct object *)((const struct range *)(list + 1) + list->ranges);
	char name[16];

	for (word n = 0; n < list->objects; n++) {
		if (objects[n].device != device || objects[n].inode != inode)
			continue;
		name[0] = 0;
		if (fd >= 0)
			name_of(fd, name, sizeof(name));
		if (!!objects[n].sysv == starts_with(name, "/SYSV"))
			return 1;
	}
	return 0;
}

/* The kernel's struct stat (and libc's), in words: device, inode, …, blocks. */
#define STAT_BLOCKS 8

static int is_listed_fd(int fd)
{
	word stat[32];
	const struct list *list = get_list();

	if (!list || !list->objects || FAILED(CALL(SYS_fstat, fd, stat, 0, 0)))
		return 0;
	return is_listed(list, fd, stat[0], stat[1]);
}

static long seek(int fd, long offset, int whence)
{
	if (whence == SEEK_DATA && is_listed_fd(fd))
		return answer((word)-ENXIO);
	return answer(CALL(SYS_lseek, fd, offset, whence, 0));
}

long lseek(int fd, long offset, int whence)
{
	return seek(fd, offset, whence);
}

long lseek64(int fd, long offset, int whence)
{
	return seek(fd, offset, whence);
}

/* tar takes a file without blocks for one hole. */
static int hide_blocks(int fd, word *stat, word ret)
{
	const struct list *list = FAILED(ret) ? 0 : get_list();

	if (list && is_listed(list, fd, stat[0], stat[1]))
		stat[STAT_BLOCKS] = 0;
	return (int)answer(ret);
}

int fstat(int fd, void *stat)
{
	return hide_blocks(fd, stat, CALL(SYS_fstat, fd, stat, 0, 0));
}

int fstat64(int fd, void *stat)
{
	return hide_blocks(fd, stat, CALL(SYS_fstat, fd, stat, 0, 0));
}

int fstatat(int fd, const char *path, void *stat, int flags)
{
	return hide_blocks(-1, stat, CALL(SYS_newfstatat, fd, path, stat, flags));
}

int fstatat64(int fd, const char *path, void *stat, int flags)
{
	return hide_blocks(-1, stat, CALL(SYS_newfstatat, fd, path, stat, flags));
}

/* The process whose directory in /proc the descriptor is; 0 for anything else. */
static word process_directory(int fd)
{
	char name[64];
	const char *rest = name + sizeof("/proc/") - 1;
	word pid;

	name_of(fd, name, sizeof(name));
	if (!starts_with(name, "/proc/"))
		return 0;
	pid = parse(&rest);
	return *rest ? 0 : pid;
}

/*
 * CRIU reads the flags of a process's mappings in its smaps (parse_smaps in CRIU's proc_parse.c, by openat with the
 * process's directory). To print that file the kernel walks through all page tables. Where the file LIST.PID exists, it
 * is what smaps would say in the lines CRIU reads. It is true until CRIU changes the process, so it is taken once.
 */
static word open_instead(int directory, const char *name, int flags)
{
	char path[4096], digits[24];
	const char *list;
	word pid, fd, length = 0;
	int n = 0;

	if (!starts_with(name, "smaps") || name[5] || (flags & O_ACCMODE) != O_RDONLY)
		return (word)-1;
	list = list_path();
	pid = list ? process_directory(directory) : 0;
	if (!pid)
		return (word)-1;
	while (list[length] && length < sizeof(path) - sizeof(digits))
		length++;
	if (list[length])
		return (word)-1;
	for (word c = 0; c < length; c++)
		path[c] = list[c];
	path[length++] = '.';
	for (; pid; pid /= 10)
		digits[n++] = (char)('0' + pid % 10);
	while (n > 0)
		path[length++] = digits[--n];
	path[length] = 0;
	fd = CALL(SYS_openat, AT_FDCWD, path, O_RDONLY | O_NOFOLLOW | (flags & O_CLOEXEC), 0);
	if (!FAILED(fd))
		CALL(SYS_unlinkat, AT_FDCWD, path, 0, 0);
	return fd;
}

static int open_at(int directory, const char *name, int flags, word mode)
{
	word fd = open_instead(directory, name, flags);

	return FAILED(fd) ? (int)answer(CALL(SYS_openat, directory, name, flags, mode)) : (int)fd;
}

/* The mode is there where a file may be made; elsewhere it is whatever happens to be, and the kernel does not look. */
#define MODE(flags, mode)                                            \
	do {                                                         \
		__builtin_va_list arguments;                         \
		__builtin_va_start(arguments, flags);                \
		mode = __builtin_va_arg(arguments, unsigned);        \
		__builtin_va_end(arguments);                         \
	} while (0)

int openat(int directory, const char *name, int flags, ...)
{
	word mode;

	MODE(flags, mode);
	return open_at(directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...)
{
	word mode;

	MODE(flags, mode);
	return open_at(directory, name, flags, mode);
}

/* What glibc's headers make of openat without a mode, where programs are built with _FORTIFY_SOURCE. */
int __openat_2(int directory, const char *name, int flags)
{
	return open_at(directory, name, flags, 0);
}

int __openat64_2(int directory, const char *name, int flags)
{
	return open_at(directory, name, flags, 0);
}

#define AF_UNIX 1
#define AF_NETLINK 16
#define NETLINK_NETFILTER 12
#define SOCK_SEQPACKET 5
#define SOCK_CLOEXEC 02000000
#define NLMSG_DONE 3
#define NLM_F_MULTI 2
/* CR_NLMSG_SEQ */
#define SEQUENCE 24680

/*
 * CRIU asks for all tracked connections of the network namespace, twice. The kernel goes through its whole table for that,
 * which all namespaces share: 9 ms each time where it has 262,144 buckets. Nothing is tracked inside a container, so the
 * question (dump_nf_ct in CRIU's net.c) gets a socket on which the end of an empty answer waits.
 */
int socket(int domain, int type, int protocol)
{
	struct { unsigned length; unsigned short type, flags; unsigned sequence, port, error; } done = {
		sizeof(done), NLMSG_DONE, NLM_F_MULTI, SEQUENCE, 0, 0,
	};
	int ends[2];
	long ret;

	if (domain != AF_NETLINK || protocol != NETLINK_NETFILTER || !list_path())
		return (int)answer(CALL(SYS_socket, domain, type, protocol, 0));
	ret = answer(CALL(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends));
	if (ret < 0)
		return -1;
	/* The other end stays open as long as the process, a child of criu that does this one thing. */
	ret = answer(CALL(SYS_write, ends[1], &done, sizeof(done), 0));
	return ret < 0 ? -1 : ends[0];
}

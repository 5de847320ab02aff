// SPDX-License-Identifier: GPL-2.0
/*
 * The first process of the machine of the bundle. Its root file system is that of the
 * host, over 9p, with a tmpfs on top that takes the changes. It loads the modules, runs
 * one command, and sends its output and exit status through ports, which the host finds
 * by their names.
 *
 * The folder of the start script is in the environment, from the kernel's command line.
 * It has the files
 *
 *	command	the folder to start in and the arguments
 *	load	lines "PATH [PARAMETER...]" of modules, with a ? if the module may fail
 *	share	paths to which the command may write on the host
 *
 * the first and the last with a null byte after each item.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROOT		"/new"
#define ITEMS		4096
#define NOT_PREPARED	125
/* A large message, and no changes by others: pages of the host's files may be cached. */
#define P9_OPTIONS	"trans=virtio,version=9p2000.L,access=any,msize=524288"

static int status_port = -1;

static void __attribute__((noreturn)) finish(int status)
{
	if (status_port >= 0) {
		dprintf(status_port, "%d\n", status);
		close(status_port);
	}
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *fmt, ...)
{
	int error = errno;
	va_list args;

	va_start(args, fmt);
	fputs("init: cannot ", stderr);
	vfprintf(stderr, fmt, args);
	fprintf(stderr, ": %s\n", strerror(error));
	va_end(args);
	finish(NOT_PREPARED);
}

static void __attribute__((format(printf, 2, 3))) path_of(char *path, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(path, PATH_MAX, fmt, args);
	va_end(args);
}

/* The content of a file, with a null byte behind it. */
static char *slurp(const char *path, size_t *size)
{
	size_t room = 1 << 16, len = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	char *text = malloc(room + 1);
	ssize_t ret;

	if (fd < 0 || !text)
		die("open %s", path);
	while ((ret = read(fd, text + len, room - len)) > 0) {
		len += ret;
		if (len == room) {
			room *= 2;
			text = realloc(text, room + 1);
			if (!text)
				die("read %s", path);
		}
	}
	if (ret < 0)
		die("read %s", path);
	close(fd);
	text[len] = 0;
	if (size)
		*size = len;
	return text;
}

/* Splits a text with a null byte after each item. */
static unsigned int split(char *text, size_t size, char *items[ITEMS + 1])
{
	unsigned int nr = 0;
	size_t at;

	for (at = 0; at < size && nr < ITEMS; at += strlen(text + at) + 1)
		items[nr++] = text + at;
	items[nr] = NULL;
	return nr;
}

/* Opens the port with this name. */
static int open_port(const char *name)
{
	const char *class = "/sys/class/virtio-ports";
	char path[PATH_MAX], *text;
	struct dirent *entry;
	DIR *dir = opendir(class);
	int fd = -1;

	while (dir && fd < 0 && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		path_of(path, "%s/%s/name", class, entry->d_name);
		text = slurp(path, NULL);
		text[strcspn(text, "\n")] = 0;
		if (!strcmp(text, name)) {
			path_of(path, "/dev/%s", entry->d_name);
			fd = open(path, O_WRONLY | O_CLOEXEC);
		}
		free(text);
	}
	if (dir)
		closedir(dir);
	if (fd < 0)
		die("open the port %s", name);
	return fd;
}

static void make(const char *path)
{
	if (mkdir(path, 0755) && errno != EEXIST)
		die("create %s", path);
}

static void mount_at(const char *source, const char *path, const char *type,
		     unsigned long flags, const char *options)
{
	if (mount(source, path, type, flags, options))
		die("mount %s", path);
}

/* Not every kernel, and not every root file system, has these. */
static void mount_if_possible(const char *path, const char *type, const char *options)
{
	mkdir(path, 0755);
	mount(type, path, type, 0, options);
}

static void mount_root(void)
{
	static const char *const moved[] = { "/dev", "/proc", "/sys" };
	/* Those that udev creates elsewhere. */
	static const char *const links[][2] = {
		{ "/proc/self/fd", "/dev/fd" }, { "/proc/self/fd/0", "/dev/stdin" },
		{ "/proc/self/fd/1", "/dev/stdout" }, { "/proc/self/fd/2", "/dev/stderr" },
	};
	char path[PATH_MAX];
	unsigned int i;

	make("/host");
	make("/over");
	make(ROOT);
	mount_at("root", "/host", "9p", MS_RDONLY, P9_OPTIONS ",cache=loose");
	mount_at("tmpfs", "/over", "tmpfs", 0, "mode=755");
	make("/over/upper");
	make("/over/work");
	mount_at("overlay", ROOT, "overlay", 0,
		 "lowerdir=/host,upperdir=/over/upper,workdir=/over/work");
	for (i = 0; i < sizeof(moved) / sizeof(*moved); i++) {
		path_of(path, ROOT "%s", moved[i]);
		make(path);
		if (mount(moved[i], path, NULL, MS_MOVE, NULL))
			die("move %s", moved[i]);
	}
	if (chdir(ROOT) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		die("change to the root of the host");
	mkdir("/run", 0755);
	mount_at("tmpfs", "/run", "tmpfs", 0, "mode=755");
	mount_if_possible("/dev/shm", "tmpfs", "mode=1777");
	mount_if_possible("/dev/pts", "devpts", NULL);
	mount_if_possible("/sys/fs/cgroup", "cgroup2", NULL);
	mount_if_possible("/sys/kernel/debug", "debugfs", NULL);
	for (i = 0; i < sizeof(links) / sizeof(*links); i++) {
		if (symlink(links[i][0], links[i][1]) && errno != EEXIST)
			die("create %s", links[i][1]);
	}
}

/* Folders of the host to which the command may write. */
static void mount_shares(const char *work)
{
	static char *paths[ITEMS + 1];
	char path[PATH_MAX], tag[16];
	unsigned int i, nr;
	size_t size;
	char *text;

	path_of(path, "%s/share", work);
	text = slurp(path, &size);
	nr = split(text, size, paths);
	for (i = 0; i < nr; i++) {
		snprintf(tag, sizeof(tag), "share%u", i);
		mount_at(tag, paths[i], "9p", 0, P9_OPTIONS ",cache=mmap");
	}
}

/* modprobe finds the modules of the bundle. */
static void link_modules(const char *bundle)
{
	char path[PATH_MAX], target[PATH_MAX];
	struct utsname uts;

	uname(&uts);
	mkdir("/lib/modules", 0755);
	mount_at("tmpfs", "/lib/modules", "tmpfs", 0, "mode=755");
	path_of(path, "/lib/modules/%s", uts.release);
	path_of(target, "%s/modules/%s", bundle, uts.release);
	if (symlink(target, path))
		die("create %s", path);
}

static void load_modules(const char *work)
{
	char path[PATH_MAX], *text, *line, *rest, *parameters;
	bool optional;
	int fd;

	path_of(path, "%s/load", work);
	text = slurp(path, NULL);
	for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		optional = *line == '?';
		line += optional;
		parameters = line + strcspn(line, " ");
		if (*parameters)
			*parameters++ = 0;
		fd = open(line, O_RDONLY | O_CLOEXEC);
		if ((fd < 0 || syscall(SYS_finit_module, fd, parameters, 0)) && !optional)
			die("load %s", line);
		close(fd);
	}
	free(text);
}

static void set_up_loopback(void)
{
	struct ifreq ifr = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return;
	if (!ioctl(fd, SIOCGIFFLAGS, &ifr)) {
		ifr.ifr_flags |= IFF_UP;
		ioctl(fd, SIOCSIFFLAGS, &ifr);
	}
	close(fd);
}

/* Becomes the command. */
static void __attribute__((noreturn)) run(const char *work, const char *bundle, int out,
					  int err)
{
	static char *items[ITEMS + 1];
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	char path[PATH_MAX];
	size_t size;
	char *text;
	int null;

	path_of(path, "%s/command", work);
	text = slurp(path, &size);
	if (split(text, size, items) < 2)
		exit(NOT_PREPARED);
	clearenv();
	path_of(path, "%s/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		bundle);
	setenv("PATH", path, 1);
	setenv("HOME", "/root", 1);
	setenv("LANG", "C.UTF-8", 1);
	setenv("VFIO_BUNDLE", bundle, 1);
	setrlimit(RLIMIT_MEMLOCK, &unlimited);
	setsid();
	null = open("/dev/null", O_RDONLY);
	dup2(null, 0);
	dup2(out, 1);
	dup2(err, 2);
	if (chdir(items[0])) {
		fprintf(stderr, "run: %s: %s\n", items[0], strerror(errno));
		exit(NOT_PREPARED);
	}
	execvp(items[1], items + 1);
	fprintf(stderr, "run: %s: %s\n", items[1], strerror(errno));
	exit(errno == ENOENT ? 127 : 126);
}

/* Copies what a pipe has to a port; returns false at the end. */
static bool copy(int from, int to)
{
	char buffer[65536];
	ssize_t len = read(from, buffer, sizeof(buffer)), at, ret;

	if (len < 0)
		return errno == EINTR;
	for (at = 0; at < len; at += ret) {
		ret = write(to, buffer + at, len - at);
		if (ret <= 0)
			return false;
	}
	return len > 0;
}

/* Copies the output of the command until no process has it, and returns its status. */
static int serve(pid_t pid, int from[2], int to[2])
{
	struct pollfd fds[2] = {
		{ .fd = from[0], .events = POLLIN }, { .fd = from[1], .events = POLLIN },
	};
	int status = 0, got;
	bool ended = false;
	pid_t child;
	int i;

	while (!ended || fds[0].fd >= 0 || fds[1].fd >= 0) {
		poll(fds, 2, 20);
		for (i = 0; i < 2; i++) {
			if (fds[i].fd >= 0 && fds[i].revents && !copy(fds[i].fd, to[i]))
				fds[i].fd = -1;
		}
		while ((child = waitpid(-1, &got, WNOHANG)) > 0) {
			if (child != pid)
				continue;
			status = WIFEXITED(got) ? WEXITSTATUS(got) : 128 + WTERMSIG(got);
			ended = true;
			/* Others may keep the output open. */
			kill(-1, SIGKILL);
		}
	}
	return status;
}

int main(void)
{
	const char *work = getenv("vfio_work"), *bundle = getenv("vfio_bundle");
	int out[2], err[2], ports[2], pipes[2];
	pid_t pid;

	make("/dev");
	make("/proc");
	make("/sys");
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount_at("proc", "/proc", "proc", 0, NULL);
	mount_at("sysfs", "/sys", "sysfs", 0, NULL);
	status_port = open_port("vfio.status");
	ports[0] = open_port("vfio.out");
	ports[1] = open_port("vfio.err");
	/* Errors from here on are for the user. */
	dup2(ports[1], 2);
	if (!work || !bundle) {
		errno = EINVAL;
		die("start without run");
	}
	mount_root();
	mount_shares(work);
	link_modules(bundle);
	set_up_loopback();
	if (sethostname("vfio", 4))
		die("set the name of the host");
	load_modules(work);

	/* A port can be opened only once, but a pipe like /dev/stdout. */
	if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
		die("create pipes");
	pid = fork();
	if (pid < 0)
		die("start a process");
	if (!pid)
		run(work, bundle, out[1], err[1]);
	close(out[1]);
	close(err[1]);
	pipes[0] = out[0];
	pipes[1] = err[0];
	finish(serve(pid, pipes, ports));
}

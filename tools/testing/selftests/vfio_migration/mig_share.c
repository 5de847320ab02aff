// SPDX-License-Identifier: GPL-2.0
/*
 * Shared use of a data_fd: another process with the descriptor, parallel readers, a
 * page fault that stalls, and one that may end in a signal.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "mig.h"

/* ---- Another process ---- */

/* A request to the other process, and its answer. */
struct message {
	bool write;
	size_t len;
	ssize_t ret;
};

static int send_all(int sock, const void *data, size_t len)
{
	const char *at = data;
	ssize_t ret;

	while (len) {
		ret = send(sock, at, len, MSG_NOSIGNAL);
		if (ret <= 0)
			return ret < 0 ? -errno : -EIO;
		at += ret;
		len -= ret;
	}
	return 0;
}

static int receive_all(int sock, void *data, size_t len)
{
	ssize_t ret;

	while (len) {
		ret = recv(sock, data, len, MSG_WAITALL);
		if (ret <= 0)
			return ret < 0 ? -errno : -EIO;
		data = (char *)data + ret;
		len -= ret;
	}
	return 0;
}

static void serve_message(int sock, const struct message *m, int fd)
{
	struct message answer = *m;
	char *data;

	data = malloc(m->len);
	if (!data || (m->write && receive_all(sock, data, m->len)))
		_exit(1);
	answer.ret = m->write ? write(fd, data, m->len) : read(fd, data, m->len);
	if (answer.ret < 0)
		answer.ret = -errno;
	close(fd);
	if (send_all(sock, &answer, sizeof(answer)) ||
	    (!m->write && answer.ret > 0 && send_all(sock, data, answer.ret)))
		_exit(1);
	free(data);
}

static void serve(int sock)
{
	char space[CMSG_SPACE(sizeof(int))];
	struct message m;
	struct iovec iov = { .iov_base = &m, .iov_len = sizeof(m) };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = space, .msg_controllen = sizeof(space),
	};
	struct cmsghdr *control;
	int fd;

	while (header.msg_controllen = sizeof(space),
	       recvmsg(sock, &header, MSG_CMSG_CLOEXEC | MSG_WAITALL) == sizeof(m)) {
		control = CMSG_FIRSTHDR(&header);
		if (!control)
			break;
		memcpy(&fd, CMSG_DATA(control), sizeof(fd));
		serve_message(sock, &m, fd);
	}
	_exit(0);
}

int mig_helper_start(struct mig_helper *helper)
{
	int socks[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socks))
		return -errno;
	helper->pid = fork();
	if (helper->pid < 0)
		return -errno;
	if (!helper->pid) {
		close(socks[0]);
		serve(socks[1]);
	}
	close(socks[1]);
	helper->sock = socks[0];
	return 0;
}

void mig_helper_stop(struct mig_helper *helper)
{
	close(helper->sock);
	waitpid(helper->pid, NULL, 0);
}

static int ask(struct mig_helper *helper, const struct message *m, int fd)
{
	char space[CMSG_SPACE(sizeof(int))] = {};
	struct iovec iov = { .iov_base = (void *)m, .iov_len = sizeof(*m) };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = space, .msg_controllen = sizeof(space),
	};
	struct cmsghdr *control = CMSG_FIRSTHDR(&header);

	control->cmsg_level = SOL_SOCKET;
	control->cmsg_type = SCM_RIGHTS;
	control->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(control), &fd, sizeof(fd));
	if (sendmsg(helper->sock, &header, MSG_NOSIGNAL) != sizeof(*m))
		return -errno;
	return 0;
}

ssize_t mig_helper_read(struct mig_helper *helper, int fd, void *data, size_t len)
{
	struct message m = { .len = len };
	int ret;

	ret = ask(helper, &m, fd);
	if (!ret)
		ret = receive_all(helper->sock, &m, sizeof(m));
	if (!ret && m.ret > 0)
		ret = receive_all(helper->sock, data, m.ret);
	return ret ? ret : m.ret;
}

ssize_t mig_helper_write(struct mig_helper *helper, int fd, const void *data,
			 size_t len)
{
	struct message m = { .write = true, .len = len };
	int ret;

	ret = ask(helper, &m, fd);
	if (!ret)
		ret = send_all(helper->sock, data, len);
	if (!ret)
		ret = receive_all(helper->sock, &m, sizeof(m));
	return ret ? ret : m.ret;
}

/* ---- Two readers ---- */

static size_t total(const struct mig_pieces *p)
{
	size_t i, sum = 0;

	for (i = 0; i < p->nr; i++)
		sum += p->len[i];
	return sum;
}

static bool fits(const struct mig_stream *whole, size_t at,
		 const struct mig_pieces *p, size_t piece, size_t from)
{
	return at + p->len[piece] <= whole->len &&
	       !memcmp(whole->data + at, p->data.data + from, p->len[piece]);
}

/*
 * Merges the pieces of both readers, each in its order: a table of the pairs of
 * counts that can make up the beginning.
 */
int mig_pieces_make_up(const struct mig_stream *whole, const struct mig_pieces *a,
		       const struct mig_pieces *b)
{
	size_t i, j, from_a = 0, from_b;
	bool *may;
	int ret;

	if (total(a) + total(b) != whole->len)
		return 0;
	may = calloc((a->nr + 1) * (b->nr + 1), sizeof(*may));
	if (!may)
		return -ENOMEM;
	may[0] = true;
	for (i = 0; i <= a->nr; i++) {
		from_b = 0;
		for (j = 0; j <= b->nr; j++) {
			bool *here = &may[i * (b->nr + 1) + j];

			if (*here && i < a->nr &&
			    fits(whole, from_a + from_b, a, i, from_a))
				here[b->nr + 1] = true;
			if (*here && j < b->nr &&
			    fits(whole, from_a + from_b, b, j, from_b))
				here[1] = true;
			if (j < b->nr)
				from_b += b->len[j];
		}
		if (i < a->nr)
			from_a += a->len[i];
	}
	ret = may[(a->nr + 1) * (b->nr + 1) - 1];
	free(may);
	return ret;
}

ssize_t mig_pieces_read(int data_fd, struct mig_pieces *p, size_t max)
{
	ssize_t ret = mig_read(data_fd, &p->data, max);
	size_t *len;

	if (ret <= 0)
		return ret;
	len = realloc(p->len, (p->nr + 1) * sizeof(*len));
	if (!len)
		return -ENOMEM;
	p->len = len;
	p->len[p->nr++] = ret;
	return ret;
}

/* ---- A fault that stalls ---- */

int mig_stall_start(struct mig_stall *stall)
{
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffdio_api api = { .api = UFFD_API };
	void *before;

	stall->uffd = -1;
	stall->len = mig_page_size();
	before = mmap(NULL, 2 * stall->len, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (before == MAP_FAILED)
		return -errno;
	stall->page = (char *)before + stall->len;
	/* Without UFFD_USER_MODE_ONLY: the fault occurs in the kernel. */
	stall->uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (stall->uffd < 0)
		return -EOPNOTSUPP;
	range.range.start = (unsigned long)stall->page;
	range.range.len = stall->len;
	if (ioctl(stall->uffd, UFFDIO_API, &api) ||
	    ioctl(stall->uffd, UFFDIO_REGISTER, &range))
		return -errno;
	return 0;
}

int mig_stall_wait(struct mig_stall *stall)
{
	struct uffd_msg msg;
	int ret;

	ret = mig_poll(stall->uffd, POLLIN, mig_hang_seconds() * 1000);
	if (ret <= 0)
		return ret ? ret : -ETIMEDOUT;
	if (read(stall->uffd, &msg, sizeof(msg)) != sizeof(msg))
		return -EIO;
	return msg.event == UFFD_EVENT_PAGEFAULT ? 0 : -EIO;
}

static int put_page(struct mig_stall *stall, const void *content, __u64 mode)
{
	struct uffdio_copy copy = {
		.dst = (unsigned long)stall->page,
		.src = (unsigned long)content,
		.len = stall->len,
		.mode = mode,
	};

	return ioctl(stall->uffd, UFFDIO_COPY, &copy) ? -errno : 0;
}

int mig_stall_end_zero(struct mig_stall *stall)
{
	struct uffdio_zeropage zero = {
		.range.start = (unsigned long)stall->page,
		.range.len = stall->len,
	};

	return ioctl(stall->uffd, UFFDIO_ZEROPAGE, &zero) ? -errno : 0;
}

int mig_stall_end(struct mig_stall *stall, const void *content)
{
	return put_page(stall, content, 0);
}

int mig_stall_fill(struct mig_stall *stall, const void *content)
{
	return put_page(stall, content, UFFDIO_COPY_MODE_DONTWAKE);
}

void mig_stall_free(struct mig_stall *stall)
{
	if (stall->uffd >= 0)
		close(stall->uffd);
	munmap((char *)stall->page - stall->len, 2 * stall->len);
}

/* ---- A fault that may end in a signal ---- */

static sigjmp_buf fault_env;

static void on_fault(int sig)
{
	siglongjmp(fault_env, sig);
}

void mig_touch_begin(void)
{
	/* SA_NODEFER: without a signal mask to restore, no system call is needed. */
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
}

int mig_touch(void *at, bool write)
{
	int sig = sigsetjmp(fault_env, 0);

	if (sig)
		return sig;
	if (write)
		__atomic_store_n((char *)at, 0x5a, __ATOMIC_RELAXED);
	else
		__atomic_load_n((char *)at, __ATOMIC_RELAXED);
	return 0;
}

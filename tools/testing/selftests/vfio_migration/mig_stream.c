// SPDX-License-Identifier: GPL-2.0
/*
 * Migration streams in memory: reading them from a data_fd and writing them to
 * one.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "mig.h"

#define READ_SIZE	(1024 * 1024)

static int make_room(struct mig_stream *s, size_t more)
{
	size_t room = s->room ? s->room : 4096;
	__u8 *data;

	while (room - s->len < more)
		room *= 2;
	if (room == s->room)
		return 0;
	data = realloc(s->data, room);
	if (!data)
		return -ENOMEM;
	s->data = data;
	s->room = room;
	return 0;
}

void mig_stream_free(struct mig_stream *s)
{
	free(s->data);
	*s = (struct mig_stream){};
}

int mig_stream_add(struct mig_stream *s, const void *data, size_t len)
{
	int ret = make_room(s, len);

	if (ret || !len)
		return ret;
	memcpy(s->data + s->len, data, len);
	s->len += len;
	return 0;
}

int mig_stream_copy(struct mig_stream *to, const struct mig_stream *from)
{
	to->len = 0;
	return mig_stream_add(to, from->data, from->len);
}

ssize_t mig_read(int data_fd, struct mig_stream *s, size_t max)
{
	ssize_t ret = make_room(s, max);

	if (ret)
		return ret;
	ret = read(data_fd, s->data + s->len, max);
	if (ret < 0)
		return -errno;
	s->len += ret;
	return ret;
}

int mig_save(int data_fd, struct mig_stream *s, size_t limit)
{
	size_t start = s->len;
	ssize_t ret;

	do {
		if (s->len - start > limit)
			return -EFBIG;
		ret = mig_read(data_fd, s, READ_SIZE);
	} while (ret > 0);
	return ret;
}

int mig_load(int data_fd, const void *data, size_t len, size_t chunk, size_t *done)
{
	const __u8 *from = data;
	size_t at = 0;
	ssize_t ret = 0;

	while (at < len) {
		ret = write(data_fd, from + at,
			    chunk && chunk < len - at ? chunk : len - at);
		if (ret < 0)
			ret = -errno;
		/* Do not repeat a write() of nothing endlessly. */
		if (ret == 0)
			ret = -EIO;
		if (ret < 0)
			break;
		at += ret;
	}
	if (done)
		*done = at;
	return ret < 0 ? ret : 0;
}

int mig_poll(int data_fd, short events, int timeout_ms)
{
	struct pollfd pfd = { .fd = data_fd, .events = events };
	int ret;

	do {
		ret = poll(&pfd, 1, timeout_ms);
	} while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : pfd.revents;
}

bool mig_fd_is_dead(int data_fd)
{
	char byte = 0;
	ssize_t ret;

	if ((fcntl(data_fd, F_GETFL) & O_ACCMODE) == O_WRONLY)
		ret = write(data_fd, &byte, 1);
	else
		ret = read(data_fd, &byte, 1);
	return ret < 0 && errno == ENODEV;
}

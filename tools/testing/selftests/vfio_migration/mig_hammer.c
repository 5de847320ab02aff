// SPDX-License-Identifier: GPL-2.0
/*
 * Threads that make random calls to a device and its data_fd concurrently, a
 * bounded number of times. The calls come from a generator with a fixed seed; only
 * their interleaving differs between runs.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mig.h"

#define THREADS	8
#define BUFFER	(64 * 1024)

struct hammer {
	const struct mig_stream *image;
	const struct mig_scratch *scratch;
	unsigned int count;
	pthread_mutex_t lock;
	int data_fd;		/* the newest, or -1 */
	char why[128];		/* the first call with an unexpected result */
};

struct worker {
	struct hammer *h;
	struct mig_device dev;	/* a descriptor of its own for the shared opening */
	pthread_t thread;
	unsigned int number;
	__u32 random;
	__u8 *buffer;
};

static __u32 draw(struct worker *w, __u32 below)
{
	/* xorshift32 */
	w->random ^= w->random << 13;
	w->random ^= w->random >> 17;
	w->random ^= w->random << 5;
	return w->random % below;
}

static void __attribute__((format(printf, 2, 3)))
accuse(struct hammer *h, const char *fmt, ...)
{
	va_list ap;

	pthread_mutex_lock(&h->lock);
	if (!h->why[0]) {
		va_start(ap, fmt);
		vsnprintf(h->why, sizeof(h->why), fmt, ap);
		va_end(ap);
	}
	pthread_mutex_unlock(&h->lock);
}

/*
 * Returns a descriptor of this thread's own for the data_fd: another thread may
 * close the shared number, which may then be reused for another file.
 */
static int take_data_fd(struct hammer *h)
{
	int fd = -1;

	pthread_mutex_lock(&h->lock);
	if (h->data_fd >= 0)
		fd = fcntl(h->data_fd, F_DUPFD_CLOEXEC, 0);
	pthread_mutex_unlock(&h->lock);
	return fd;
}

static void put_data_fd(struct hammer *h, int fd)
{
	int old;

	pthread_mutex_lock(&h->lock);
	old = h->data_fd;
	h->data_fd = fd;
	pthread_mutex_unlock(&h->lock);
	if (old >= 0)
		close(old);
}

static void set_state(struct worker *w)
{
	__u32 state = draw(w, MIG_STATE_NR + 1);
	int fd = -1;

	/* May fail: the current state is unknown. */
	if (!mig_set_state(&w->dev, state, &fd) && fd >= 0)
		put_data_fd(w->h, fd);
}

static void get_state(struct worker *w)
{
	__u32 state;
	__u64 size;
	int ret;

	ret = mig_get_state(&w->dev, &state);
	if (ret)
		accuse(w->h, "GET of MIG_DEVICE_STATE: %s", strerror(-ret));
	ret = mig_data_size(&w->dev, &size);
	if (ret)
		accuse(w->h, "GET of MIG_DATA_SIZE: %s", strerror(-ret));
}

static void access_regions(struct worker *w)
{
	const struct mig_scratch *s = w->h->scratch;
	size_t len = 1 + draw(w, BUFFER), at;

	/* The header of a PCI device can be read without side effects. */
	if (w->dev.info.flags & VFIO_DEVICE_FLAGS_PCI)
		mig_region_read(&w->dev, VFIO_PCI_CONFIG_REGION_INDEX, 0, w->buffer, 64);
	if (!s->len)
		return;
	at = draw(w, s->len);
	if (len > s->len - at)
		len = s->len - at;
	if (draw(w, 2))
		mig_region_write(&w->dev, s->region, s->offset + at, w->buffer, len);
	else
		mig_region_read(&w->dev, s->region, s->offset + at, w->buffer, len);
}

static void use_data_fd(struct worker *w)
{
	const struct mig_stream *image = w->h->image;
	struct vfio_precopy_info info;
	size_t len = 1 + draw(w, BUFFER), at;
	int fd, ret = 0;

	fd = take_data_fd(w->h);
	if (fd < 0)
		return;
	switch (draw(w, 8)) {
	case 0:
		ret = mig_precopy_info(fd, &info);
		if (ret && ret != -ENODEV && ret != -EINVAL && ret != -ENOTTY)
			accuse(w->h, "VFIO_MIG_GET_PRECOPY_INFO: %s", strerror(-ret));
		break;
	case 1:
		mig_poll(fd, POLLIN | POLLOUT, 0);
		break;
	case 2:
		/* Other threads keep their duplicates until they close them. */
		put_data_fd(w->h, -1);
		break;
	case 3:
	case 4:
		at = draw(w, image->len);
		if (len > image->len - at)
			len = image->len - at;
		/* Any error is valid: the data is not an image. */
		if (write(fd, image->data + at, len) < 0 && errno == EFAULT)
			accuse(w->h, "write() of readable memory: EFAULT");
		break;
	default:
		if (read(fd, w->buffer, len) < 0 && errno != ENODEV &&
		    errno != ENOMSG && errno != EBADF)
			accuse(w->h, "read(): %s", strerror(errno));
		break;
	}
	close(fd);
}

static void *worker_main(void *arg)
{
	struct worker *w = arg;
	struct hammer *h = w->h;
	unsigned int i, open = h->count * (w->number + 1) / THREADS;

	for (i = 0; i < h->count; i++) {
		/* The threads close the device one after the other. */
		if (i == open)
			mig_close_device(&w->dev);
		if (w->dev.fd < 0) {
			use_data_fd(w);
			continue;
		}
		switch (draw(w, 10)) {
		case 0:
			if (mig_reset(&w->dev))
				accuse(h, "VFIO_DEVICE_RESET: %s", strerror(errno));
			break;
		case 1:
		case 2:
		case 3:
			set_state(w);
			break;
		case 4:
			get_state(w);
			break;
		case 5:
			access_regions(w);
			break;
		default:
			use_data_fd(w);
			break;
		}
	}
	mig_close_device(&w->dev);
	return NULL;
}

int mig_hammer(struct mig_device *dev, const struct mig_stream *image,
	       const struct mig_scratch *scratch, unsigned int count, __u32 seed,
	       char *why, size_t why_len)
{
	struct hammer h = {
		.image = image, .scratch = scratch, .count = count,
		.lock = PTHREAD_MUTEX_INITIALIZER, .data_fd = -1,
	};
	struct worker workers[THREADS] = {};
	unsigned int i, started;
	int ret = 0;

	for (started = 0; started < THREADS && !ret; started++) {
		struct worker *w = &workers[started];

		w->h = &h;
		w->dev = *dev;
		w->number = started;
		w->random = (seed + 1) * 0x9e3779b9 + started;
		w->buffer = calloc(1, BUFFER);
		w->dev.fd = fcntl(dev->fd, F_DUPFD_CLOEXEC, 0);
		if (!w->buffer || w->dev.fd < 0)
			ret = -ENOMEM;
		else
			ret = -pthread_create(&w->thread, NULL, worker_main, w);
		if (ret)
			break;
	}
	/* The last thread closes the device while the others use the data_fd. */
	mig_close_device(dev);
	for (i = 0; i < started; i++) {
		pthread_join(workers[i].thread, NULL);
		free(workers[i].buffer);
	}
	put_data_fd(&h, -1);
	snprintf(why, why_len, "%s", h.why);
	return ret;
}

// SPDX-License-Identifier: GPL-2.0
/* The data_fd: read(), write(), poll() and splice(), by one and by several users. */

TEST_F(device, data_fd_is_unidirectional_stream)
{
	static const __u32 states[] = { MIG_PRE_COPY, MIG_STOP_COPY, MIG_RESUMING };
	char byte = 0;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	unsigned int i;
	int fd, flags;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		flags = fcntl(fd, F_GETFD);
		EXPECT_EQ(FD_CLOEXEC, flags & FD_CLOEXEC)
			PROMISE("a data_fd is close-on-exec");
		if (states[i] == MIG_RESUMING) {
			EXPECT_ERRNO(EBADF, read(fd, &byte, 1))
				PROMISE("the data_fd of RESUMING cannot be read");
		} else {
			EXPECT_ERRNO(EBADF, write(fd, &byte, 1))
				PROMISE("the data_fd of %s cannot be written",
					mig_state_name(states[i]));
		}
		EXPECT_ERRNO(ESPIPE, lseek(fd, 0, SEEK_SET))
			PROMISE("migration data is a stream: no lseek (%s)",
				mig_state_name(states[i]));
		EXPECT_ERRNO(ESPIPE, pread(fd, &byte, 1, 0))
			PROMISE("migration data is a stream: no pread (%s)",
				mig_state_name(states[i]));
		EXPECT_ERRNO(ESPIPE, pwrite(fd, &byte, 1, 0))
			PROMISE("migration data is a stream: no pwrite (%s)",
				mig_state_name(states[i]));
		EXPECT_ERRNO(ESPIPE, preadv(fd, &iov, 1, 0))
			PROMISE("migration data is a stream: no preadv (%s)",
				mig_state_name(states[i]));
		EXPECT_ERRNO(ESPIPE, pwritev(fd, &iov, 1, 0))
			PROMISE("migration data is a stream: no pwritev (%s)",
				mig_state_name(states[i]));
		EXPECT_ERRNO(ENOTTY, ioctl(fd, NO_SUCH_IOCTL, &byte))
			PROMISE("an ioctl that the data_fd does not support is ENOTTY (%s)",
				mig_state_name(states[i]));
		close(fd);
	}
}

/* Nothing is consumed: the image is still complete afterwards. */
TEST_F(device, empty_and_faulting_reads_consume_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	EXPECT_EQ(0, read(fd, &byte, 0))
		PROMISE("a read of zero bytes returns 0");
	EXPECT_LT(0, mig_read(fd, &image, 7));
	EXPECT_EQ(0, read(fd, &byte, 0));
	EXPECT_ERRNO(EFAULT, read(fd, edge, 64))
		PROMISE("a read into an invalid buffer is EFAULT");
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 0));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* A read across an unmapped page returns a part; the next read returns the rest. */
TEST_F(device, read_across_fault_loses_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	char *edge, byte;
	ssize_t ret;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		ret = read(fd, edge - 13, 64);
		/* Either the part that fits was delivered, or nothing was consumed. */
		if (ret < 0) {
			EXPECT_EQ(EFAULT, errno);
			ret = read(fd, edge - 13, 13);
		}
		EXPECT_GE(13, ret)
			PROMISE("only the bytes copied are counted");
		ASSERT_EQ(0, mig_stream_add(&image, edge - 13, ret > 0 ? ret : 0));
	} while (ret > 0 && image.len < SMALL_IMAGE);
	ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	EXPECT_EQ(0, read(fd, &byte, 1));
	to = open_target(_metadata, &self->dev, &second);
	load_and_run(_metadata, to, &image, 0);
}

/* Reads with readv(), filling the buffers in order. Returns the number of bytes or -errno. */
static ssize_t read_vector(int fd, struct mig_stream *s, const struct iovec *iov,
			   unsigned int nr)
{
	ssize_t ret = readv(fd, iov, nr), left = ret;
	size_t part;
	unsigned int i;

	if (ret < 0)
		return -errno;
	for (i = 0; i < nr && left; i++, left -= part) {
		part = iov[i].iov_len < (size_t)left ? iov[i].iov_len : (size_t)left;
		if (mig_stream_add(s, iov[i].iov_base, part))
			return -ENOMEM;
	}
	return left ? -EOVERFLOW : ret;
}

/* Buffers of several sizes are filled in order, up to one that faults. */
TEST_F_TIMEOUT(device, readv_and_writev_keep_the_order, 120)
{
	static __u8 first[1], second[4095], third[7], fourth[65536];
	struct mig_device other = { .fd = -1 }, *to;
	struct iovec iov[] = {
		{ first, sizeof(first) }, { second, sizeof(second) },
		{ third, sizeof(third) }, { fourth, sizeof(fourth) },
	};
	struct mig_stream image = {};
	size_t at = 0, part;
	struct iovec hole[2];
	ssize_t ret;
	char *edge;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += sysconf(_SC_PAGESIZE);
	hole[0] = (struct iovec){ edge - 13, 13 };
	hole[1] = (struct iovec){ edge, 64 };

	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	ret = read_vector(fd, &image, hole, 2);
	ASSERT_LT(0, ret)
		PROMISE("a readv() returns the bytes copied before a fault (%s)",
			strerror(-ret));
	ASSERT_GE(13, ret)
		PROMISE("only the bytes copied are counted");
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
		ASSERT_LE(0, ret)
			PROMISE("readv() reads like read() (%s)", strerror(-ret));
		ASSERT_LT(image.len, stream_limit(&self->dev));
	} while (ret > 0);
	EXPECT_EQ(0, read_vector(fd, &image, iov, ARRAY_SIZE(iov)))
		PROMISE("permanent end of stream: readv() always returns 0");
	close(fd);

	to = open_target(_metadata, &self->dev, &other);
	fd = go(_metadata, to, MIG_RESUMING);
	memcpy(edge - 13, image.data, 13);
	ret = writev(fd, hole, 2);
	ASSERT_LT(0, ret)
		PROMISE("a writev() returns the bytes taken before a fault (%s)",
			strerror(errno));
	ASSERT_GE(13, ret)
		PROMISE("only the bytes taken are counted");
	for (at = ret; at < image.len; at += ret) {
		part = image.len - at;
		iov[0] = (struct iovec){ image.data + at, part ? 1 : 0 };
		iov[1] = (struct iovec){ image.data + at + 1, part > 4096 ? 4095 : 0 };
		iov[2] = (struct iovec){ image.data + at + 4096, part > 4103 ? 7 : 0 };
		iov[3] = (struct iovec){ image.data + at + 4103,
					 part > 8192 ? 4089 : 0 };
		ret = writev(fd, iov, ARRAY_SIZE(iov));
		ASSERT_LT(0, ret)
			PROMISE("writev() writes like write() (%s)", strerror(errno));
	}
	ASSERT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("readv() and writev() neither lose nor repeat bytes");
	move_on(_metadata, to, MIG_RUNNING);
	close(fd);
}

/* The call after the last byte returns ENOMSG, not the call with the last bytes. */
TEST_F_TIMEOUT(device, readv_stops_before_temporary_end, 60)
{
	static __u8 first[100], second[8192];
	struct mig_device other = { .fd = -1 }, *to;
	struct iovec iov[] = {
		{ first, sizeof(first) }, { second, sizeof(second) },
	};
	struct mig_stream image = {};
	struct vfio_precopy_info info;
	ssize_t ret;
	int fd, i;

	NEED_PRE_COPY(&self->dev);
	fd = go(_metadata, &self->dev, MIG_PRE_COPY);
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
		if (image.len > stream_limit(&self->dev))
			SKIP(return, "the device does not become quiet in PRE_COPY");
	} while (ret > 0);
	ASSERT_EQ(-ENOMSG, ret)
		PROMISE(TEMPORARY_END " (%zd after %zu bytes)", ret, image.len);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(-ENOMSG, read_vector(fd, &image, iov, ARRAY_SIZE(iov)))
			PROMISE(TEMPORARY_END);
	}
	ASSERT_EQ(0, mig_precopy_info(fd, &info));
	EXPECT_EQ(0U, info.initial_bytes + info.dirty_bytes)
		PROMISE("temporary end: both initial_bytes and dirty_bytes are zero");

	move_on(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		ret = read_vector(fd, &image, iov, ARRAY_SIZE(iov));
	} while (ret > 0);
	ASSERT_EQ(0, ret)
		PROMISE("in STOP_COPY the end is permanent; ENOMSG may not be returned");
	to = open_target(_metadata, &self->dev, &other);
	load_and_run(_metadata, to, &image, 0);
}

/* splice() moves the stream through a pipe, or fails with EINVAL without effect. */
TEST_F_TIMEOUT(device, splice_moves_the_stream_or_is_refused, 60)
{
	struct mig_device other = { .fd = -1 }, *to;
	struct mig_stream image = {};
	ssize_t in, out, ret;
	int fd, pipes[2];
	char byte;

	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		in = splice(fd, NULL, pipes[1], NULL, 1 << 16, 0);
		if (in < 0)
			break;
		for (out = 0; out < in; out += ret) {
			ret = mig_read(pipes[0], &image, in - out);
			ASSERT_LT(0, ret);
		}
		ASSERT_LT(image.len, stream_limit(&self->dev));
	} while (in > 0);
	if (in < 0) {
		ASSERT_EQ(EINVAL, errno)
			PROMISE("a data_fd without splice() returns EINVAL");
		ASSERT_EQ(0U, image.len)
			PROMISE("a data_fd without splice() returns EINVAL from the start");
		ASSERT_EQ(0, mig_save(fd, &image, stream_limit(&self->dev)));
	}
	EXPECT_EQ(0, read(fd, &byte, 1))
		PROMISE("permanent end of stream: read() always returns 0");
	close(fd);

	to = open_target(_metadata, &self->dev, &other);
	fd = go(_metadata, to, MIG_RESUMING);
	for (out = 0; out < (ssize_t)image.len; out += in) {
		in = image.len - out < 4096 ? image.len - out : 4096;
		ASSERT_EQ(in, write(pipes[1], image.data + out, in));
		ret = splice(pipes[0], NULL, fd, NULL, in, 0);
		if (ret < 0)
			break;
		ASSERT_EQ(in, ret)
			PROMISE("a data_fd takes all data of a splice()");
	}
	if (out < (ssize_t)image.len) {
		ASSERT_EQ(EINVAL, errno)
			PROMISE("a data_fd without splice() returns EINVAL");
		ASSERT_EQ(0, out)
			PROMISE("a data_fd without splice() returns EINVAL from the start");
		ASSERT_EQ(0, mig_load(fd, image.data, image.len, 0, NULL));
	}
	ASSERT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("splice() neither loses nor repeats bytes");
	move_on(_metadata, to, MIG_RUNNING);
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

TEST_F(device, poll_in_every_state)
{
	static const __u32 states[] = {
		MIG_PRE_COPY, MIG_PRE_COPY_P2P, MIG_STOP_COPY, MIG_RESUMING,
	};
	int fd, events, want;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(states); i++) {
		if (!mig_fsm_exists(self->dev.flags, states[i]))
			continue;
		fd = go(_metadata, &self->dev, states[i]);
		want = states[i] == MIG_RESUMING ? POLLOUT : POLLIN;
		events = mig_poll(fd, POLLIN | POLLOUT, 0);
		EXPECT_EQ(want, events & want)
			PROMISE("the data_fd of a new %s session is %s", mig_state_name(states[i]),
				want == POLLIN ? "readable" : "writable");
		EXPECT_EQ(0, events & (POLLERR | POLLHUP | POLLNVAL))
			PROMISE("a new %s session has no error (%#x)",
				mig_state_name(states[i]), events);
		if (mig_reset(&self->dev))
			mig_set_state(&self->dev, MIG_RUNNING, NULL);
		EXPECT_NE(0, mig_poll(fd, POLLIN | POLLOUT, 0))
			PROMISE("poll does not wait for a %s session that has ended",
				mig_state_name(states[i]));
		close(fd);
	}
}

/* Reads without waiting to an end of the stream; returns the result of the last read(). */
static ssize_t read_as_polled(struct __test_metadata *_metadata, int fd,
			      struct mig_stream *image, size_t limit)
{
	short events;
	ssize_t ret;

	do {
		events = mig_poll(fd, POLLIN, 0);
		ret = mig_read(fd, image, 1 << 16);
		if (events & POLLIN) {
			EXPECT_NE(-EAGAIN, ret)
				PROMISE("after POLLIN a read() does not fail with EAGAIN");
		} else if (ret == -EAGAIN) {
			ASSERT_NE(0, mig_poll(fd, POLLIN, mig_hang_seconds() * 1000))
				PROMISE("poll waits for more data: at an end of stream read() does not fail with EAGAIN");
			ret = 1;
		}
	} while (ret > 0 && image->len < limit);
	return ret;
}

TEST_F_TIMEOUT(device, nonblocking_read_agrees_with_poll, 120)
{
	struct mig_stream image = {};
	bool pre_copy = self->dev.flags & VFIO_MIGRATION_PRE_COPY;
	ssize_t ret;
	int fd;

	fd = go(_metadata, &self->dev, pre_copy ? MIG_PRE_COPY : MIG_STOP_COPY);
	ASSERT_EQ(0, fcntl(fd, F_SETFL, O_NONBLOCK));
	if (pre_copy) {
		ret = read_as_polled(_metadata, fd, &image, stream_limit(&self->dev));
		if (ret > 0)
			SKIP(return, "the device does not become quiet in PRE_COPY");
		EXPECT_EQ(-ENOMSG, ret)
			PROMISE(TEMPORARY_END " (%s)", strerror(-ret));
		move_on(_metadata, &self->dev, MIG_STOP_COPY);
	}
	EXPECT_EQ(0, read_as_polled(_metadata, fd, &image, 2 * stream_limit(&self->dev)))
		PROMISE("permanent end of stream: read() returns 0, with O_NONBLOCK as well");
}

/* A write that faults takes the readable part or nothing; the rest can follow. */
TEST_F(device, empty_and_faulting_writes_consume_nothing)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t at = 0, part;
	ssize_t ret;
	char *edge;
	int fd;

	edge = page_before_a_hole();
	ASSERT_NE(NULL, edge);
	edge += mig_page_size();
	take_image(_metadata, &self->dev, &image);
	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	EXPECT_EQ(0, write(fd, image.data, 0))
		PROMISE("a write of zero bytes returns 0");
	EXPECT_ERRNO(EFAULT, write(fd, edge, 16))
		PROMISE("a write from an invalid buffer is EFAULT");
	while (at < image.len) {
		part = image.len - at < 1000 ? image.len - at : 1000;
		memcpy(edge - part, image.data + at, part);
		ret = -1;
		/* The image ends before the unmapped page. */
		if (part < image.len - at)
			ret = write(fd, edge - part, part + 16);
		if (ret < 0)
			ret = write(fd, edge - part, part);
		ASSERT_LT(0, ret)
			PROMISE("readable bytes are taken: %s", strerror(errno));
		ASSERT_GE((ssize_t)part, ret)
			PROMISE("only the bytes taken are counted");
		at += ret;
	}
	EXPECT_EQ(0, write(fd, image.data, 0));
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("faults neither lose nor repeat bytes: the image is complete");
}

/* A thread that reads or writes a part of a shared stream. */
struct sharer {
	pthread_t thread;
	int fd;
	size_t chunk;
	struct mig_pieces got;		/* of a reader */
	const __u8 *from;		/* of a writer */
	size_t len;
	struct sharer *after;		/* starts after that one, or NULL */
	atomic_bool begun;
	struct poller poller;		/* of a reader, to find out whether it sleeps */
	int err;
};

static void *reader_main(void *arg)
{
	struct sharer *s = arg;
	ssize_t ret;

	atomic_store(&s->poller.tid, gettid());
	while ((ret = mig_pieces_read(s->fd, &s->got, s->chunk)) > 0)
		;
	s->err = ret;
	atomic_store(&s->poller.done, true);
	return NULL;
}

static void *writer_main(void *arg)
{
	struct sharer *s = arg;
	size_t first = s->chunk < s->len ? s->chunk : s->len;

	while (s->after && !atomic_load(&s->after->begun))
		sched_yield();
	s->err = mig_load(s->fd, s->from, first, 0, NULL);
	atomic_store(&s->begun, true);
	if (!s->err)
		s->err = mig_load(s->fd, s->from + first, s->len - first, s->chunk, NULL);
	return NULL;
}

TEST_F_TIMEOUT(device, parallel_readers_get_disjoint_ordered_bytes, 120)
{
	struct mig_stream image = {};
	struct sharer sharers[2];
	unsigned int i, r;
	int fd;

	if (!save_steady(_metadata, &self->dev, &image))
		SKIP(return, "two images of the stopped device differ");
	for (r = 0; r < mig_times(2); r++) {
		fd = go(_metadata, &self->dev, MIG_STOP_COPY);
		memset(sharers, 0, sizeof(sharers));
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			sharers[i].fd = fd;
			sharers[i].chunk = image.len / 100 + 13 + i;
			ASSERT_EQ(0, pthread_create(&sharers[i].thread, NULL, reader_main,
						    &sharers[i]));
		}
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			pthread_join(sharers[i].thread, NULL);
			EXPECT_EQ(0, sharers[i].err)
				PROMISE("each reader reaches the permanent end: %s",
					strerror(-sharers[i].err));
		}
		EXPECT_EQ(image.len, sharers[0].got.data.len + sharers[1].got.data.len)
			PROMISE("each byte goes to exactly one of the parallel readers");
		EXPECT_EQ(1, mig_pieces_make_up(&image, &sharers[0].got, &sharers[1].got))
			PROMISE("each of the parallel readers gets its bytes in order");
		close(fd);
		move_on(_metadata, &self->dev, MIG_RUNNING);
	}
}

TEST_F_TIMEOUT(device, parallel_writers_load_valid_image_or_fail, 120)
{
	struct mig_stream image = {}, whole = {}, now = {};
	unsigned int i, r, refused = 0;
	struct sharer sharers[2];
	bool steady;
	int fd, ret;

	NEED_RESET(&self->dev);
	take_image(_metadata, &self->dev, &image);
	load_and_run(_metadata, &self->dev, &image, 0);
	steady = save_steady(_metadata, &self->dev, &whole);

	for (r = 0; r < mig_times(4); r++) {
		ASSERT_EQ(0, mig_reset(&self->dev));
		fd = go(_metadata, &self->dev, MIG_RESUMING);
		memset(sharers, 0, sizeof(sharers));
		for (i = 0; i < ARRAY_SIZE(sharers); i++) {
			sharers[i].fd = fd;
			sharers[i].chunk = image.len / 32 + 1;
			sharers[i].from = image.data + i * (image.len / 2);
			sharers[i].len = i ? image.len - image.len / 2 : image.len / 2;
		}
		/* In every second round the order is certainly wrong. */
		if (r % 2)
			sharers[0].after = &sharers[1];
		for (i = 0; i < ARRAY_SIZE(sharers); i++)
			ASSERT_EQ(0, pthread_create(&sharers[i].thread, NULL, writer_main,
						    &sharers[i]));
		for (i = 0; i < ARRAY_SIZE(sharers); i++)
			pthread_join(sharers[i].thread, NULL);
		ret = mig_set_state(&self->dev, MIG_STOP, NULL);
		if (sharers[0].err || sharers[1].err) {
			EXPECT_NE(0, ret)
				PROMISE("data that write() refused (%s) is not incorporated into the device state",
					strerror(-(sharers[0].err ?: sharers[1].err)));
		}
		close(fd);
		refused += ret != 0;
		if (ret)
			continue;
		move_on(_metadata, &self->dev, MIG_RUNNING);
		if (!save_steady(_metadata, &self->dev, &now) || !steady)
			continue;
		EXPECT_TRUE(now.len == whole.len && !memcmp(now.data, whole.data, now.len))
			PROMISE("parallel writers load a valid image or cause an error");
	}
	EXPECT_NE(0U, refused)
		PROMISE("inconsistent data (second half first) is refused");
	ASSERT_EQ(0, mig_reset(&self->dev));
	load_and_run(_metadata, &self->dev, &image, 0);
}

/* One read() or write() by a child process with an inherited descriptor. */
static ssize_t in_child(int fd, __u8 *shared, size_t len, bool write_it)
{
	ssize_t *ret = (ssize_t *)shared;
	pid_t child;

	*ret = -ECHILD;
	child = fork();
	if (!child) {
		*ret = write_it ? write(fd, ret + 1, len) : read(fd, ret + 1, len);
		_exit(0);
	}
	if (child < 0 || waitpid(child, NULL, 0) != child)
		return -ECHILD;
	return *ret;
}

TEST_F(device, duplicates_share_one_stream)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	size_t page = mig_page_size(), at = 0;
	int fd, copy, i;
	__u8 *shared;
	ssize_t ret;

	shared = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	ASSERT_NE(MAP_FAILED, shared);
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	copy = dup(fd);
	ASSERT_LE(0, copy);
	for (i = 0; i < 3; i++) {
		EXPECT_LT(0, mig_read(fd, &image, 5))
			PROMISE("a descriptor and its duplicates read one stream");
		EXPECT_LT(0, mig_read(copy, &image, 3))
			PROMISE("a descriptor and its duplicates read one stream");
		ret = in_child(fd, shared, 4, false);
		ASSERT_LT(0, ret)
			PROMISE("a forked process continues reading the same stream");
		ASSERT_EQ(0, mig_stream_add(&image, shared + sizeof(ssize_t), ret));
	}
	close(fd);
	ASSERT_EQ(0, mig_save(copy, &image, stream_limit(&self->dev)))
		PROMISE("a duplicate stays valid after the original is closed");
	close(copy);

	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	copy = dup(fd);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(0, mig_load(fd, image.data + at, 5, 0, NULL));
		EXPECT_EQ(0, mig_load(copy, image.data + at + 5, 3, 0, NULL));
		memcpy(shared + sizeof(ssize_t), image.data + at + 8, 4);
		EXPECT_EQ(4, in_child(fd, shared, 4, true))
			PROMISE("a forked process continues writing the same stream");
		at += 12;
	}
	close(fd);
	EXPECT_EQ(0, mig_load(copy, image.data + at, image.len - at, 0, NULL));
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("a descriptor, its duplicates and those of a child write one stream");
}

TEST_F(device, data_fd_in_another_process)
{
	struct mig_device second = { .fd = -1 }, *to;
	struct mig_stream image = {};
	struct mig_helper helper;
	__u8 buffer[4096];
	size_t at = 0, part;
	ssize_t ret;
	int fd;

	ASSERT_EQ(0, mig_helper_start(&helper));
	fd = go(_metadata, &self->dev, MIG_STOP_COPY);
	do {
		EXPECT_LE(0, mig_read(fd, &image, 9));
		ret = mig_helper_read(&helper, fd, buffer, sizeof(buffer));
		ASSERT_LE(0, ret)
			PROMISE("a process that received the data_fd can read from it: %s",
				strerror(-ret));
		ASSERT_EQ(0, mig_stream_add(&image, buffer, ret));
	} while (ret > 0);
	close(fd);

	to = open_target(_metadata, &self->dev, &second);
	fd = go(_metadata, to, MIG_RESUMING);
	while (at < image.len) {
		part = image.len - at < sizeof(buffer) ? image.len - at : sizeof(buffer);
		ret = mig_helper_write(&helper, fd, image.data + at, part);
		ASSERT_LT(0, ret)
			PROMISE("a process that received the data_fd can write to it: %s",
				strerror(-ret));
		at += ret;
		part = image.len - at < 9 ? image.len - at : 9;
		EXPECT_EQ(0, mig_load(fd, image.data + at, part, 0, NULL));
		at += part;
	}
	EXPECT_EQ(0, mig_set_state(to, MIG_STOP, NULL))
		PROMISE("two processes in turns transfer a whole image");
	mig_helper_stop(&helper);
}

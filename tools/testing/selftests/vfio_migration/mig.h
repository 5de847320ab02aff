/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A small library over the VFIO migration uAPI for the tests in this directory:
 * devices of either backend, the features and ioctls, whole streams in memory,
 * and a model of the state machine.
 *
 * Functions return 0 (or a count) or a negative errno; they do not fail the test.
 */
#ifndef MIG_H
#define MIG_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include <linux/types.h>
#include <linux/vfio.h>

/* The states of a device. */
#define MIG_ERROR		((__u32)VFIO_DEVICE_STATE_ERROR)
#define MIG_STOP		((__u32)VFIO_DEVICE_STATE_STOP)
#define MIG_RUNNING		((__u32)VFIO_DEVICE_STATE_RUNNING)
#define MIG_STOP_COPY		((__u32)VFIO_DEVICE_STATE_STOP_COPY)
#define MIG_RESUMING		((__u32)VFIO_DEVICE_STATE_RESUMING)
#define MIG_RUNNING_P2P		((__u32)VFIO_DEVICE_STATE_RUNNING_P2P)
#define MIG_PRE_COPY		((__u32)VFIO_DEVICE_STATE_PRE_COPY)
#define MIG_PRE_COPY_P2P	((__u32)VFIO_DEVICE_STATE_PRE_COPY_P2P)
#define MIG_STATE_NR		VFIO_DEVICE_STATE_NR

/* The page size of the kernel in bytes. */
__u64 mig_page_size(void);

/* The factor for all timeouts: option patience, or 1. */
int mig_patience(void);

/*
 * Upper bound in seconds for operations that do not wait: a guard against hangs.
 * The option hang overrides it.
 */
int mig_hang_seconds(void);

/* An option "--name value" of a test program, or "--name" without an argument. */
struct mig_option {
	const char *name;	/* NULL ends an array */
	const char *argument;
	bool number;		/* the argument is one */
	const char *help;
	const char *value;	/* NULL if it is not given */
};

/*
 * Parses @options and the common options, removes them from @argv, and returns the new
 * @argc. Exits if an option is unknown or has a bad value.
 */
int mig_take_options(int argc, char **argv, struct mig_option *options);
/* The value of an option, or NULL. */
const char *mig_option(const char *name);
/* The value as a number; @otherwise if the option is absent or 0. */
unsigned long mig_number(const char *name, unsigned long otherwise);

enum mig_backend {
	MIG_GROUP,	/* /dev/vfio/N in a type1 container */
	MIG_IOMMUFD,	/* /dev/vfio/devices/vfioN bound to an iommufd */
};

struct mig_device {
	const char *sysfs;
	enum mig_backend backend;
	int fd;
	int group;
	int iommu;		/* the container or the iommufd */
	__u32 ioas;		/* in the iommufd */
	__u32 id;		/* of the device in the iommufd */
	__u64 flags;		/* of VFIO_DEVICE_FEATURE_MIGRATION, 0: none */
	struct vfio_device_info info;
	char why[256];		/* reason for the failure of mig_open() */
};

/*
 * Opens the device at @sysfs and queries its migration flags. -EOPNOTSUPP means
 * that the device or the kernel does not offer @backend; dev->why has the reason.
 */
int mig_open(struct mig_device *dev, const char *sysfs, enum mig_backend backend);
void mig_close(struct mig_device *dev);

/* Only the first step: the group outside a container, or the device not bound. */
int mig_open_group(struct mig_device *dev, const char *sysfs);
int mig_open_unbound(struct mig_device *dev, const char *sysfs);
/* Completes mig_open_unbound(). */
int mig_bind(struct mig_device *dev);

/* Closes and reopens the device only: the container or iommufd stays open. */
void mig_close_device(struct mig_device *dev);
int mig_reopen_device(struct mig_device *dev);

/* One VFIO_DEVICE_FEATURE call with @size bytes at @data, in both directions. */
int mig_feature(const struct mig_device *dev, __u32 flags, void *data, size_t size);
/* The same with an argsz that does not match the buffer. */
int mig_feature_argsz(const struct mig_device *dev, __u32 flags, void *data,
		      size_t size, __u32 argsz);

int mig_get_state(const struct mig_device *dev, __u32 *state);
/* @data_fd may be NULL: a new descriptor is closed then. */
int mig_set_state(const struct mig_device *dev, __u32 state, int *data_fd);
int mig_data_size(const struct mig_device *dev, __u64 *size);
int mig_opt_in_v2(const struct mig_device *dev);
int mig_reset(const struct mig_device *dev);
/*
 * Enables memory space and bus mastering in the command register, like a VMM for
 * its guest. Called by mig_open(), mig_reopen_device() and mig_reset().
 */
int mig_enable(const struct mig_device *dev);
int mig_precopy_info(int data_fd, struct vfio_precopy_info *info);

int mig_log_start(const struct mig_device *dev, __u64 *page_size,
		  const struct vfio_device_feature_dma_logging_range *ranges,
		  __u32 nr);
int mig_log_stop(const struct mig_device *dev);
int mig_log_report(const struct mig_device *dev, __u64 iova, __u64 length,
		   __u64 page_size, __u64 *bitmap);

/* Access rights of the device to a mapping of this process's memory. */
#define MIG_DMA_READ	1
#define MIG_DMA_WRITE	2

int mig_dma_map(const struct mig_device *dev, __u64 iova, void *at, __u64 len,
		unsigned int prot);
int mig_dma_unmap(const struct mig_device *dev, __u64 iova, __u64 len);
/* Detaches the device from its IOAS, and attaches it again; iommufd only. */
int mig_dma_detach(const struct mig_device *dev);
int mig_dma_attach(const struct mig_device *dev);

int mig_region_info(const struct mig_device *dev, __u32 index,
		    struct vfio_region_info *info);
int mig_irq_info(const struct mig_device *dev, __u32 index,
		 struct vfio_irq_info *info);
int mig_set_irqs(const struct mig_device *dev, __u32 index, __u32 flags,
		 __u32 start, __u32 count, const void *data, size_t size);

/* One access to a region at offset @at: the number of bytes or -errno. */
ssize_t mig_region_read(const struct mig_device *dev, __u32 index, __u64 at,
			void *data, size_t len);
ssize_t mig_region_write(const struct mig_device *dev, __u32 index, __u64 at,
			 const void *data, size_t len);

/*
 * Maps @len bytes of a region. -EOPNOTSUPP: the region, or this part of it,
 * cannot be mapped.
 */
int mig_region_map(const struct mig_device *dev, __u32 index, __u64 at, size_t len,
		   void **map);

/* Memory of the device that the tests may write to; len is 0 without it. */
struct mig_scratch {
	__u32 region;
	__u64 offset;		/* in the region */
	size_t len;
};

/* Reads "REGION:OFFSET:LENGTH"; NULL means none. -EINVAL for anything else. */
int mig_scratch_parse(const char *text, struct mig_scratch *scratch);
int mig_scratch_read(const struct mig_device *dev, const struct mig_scratch *s,
		     __u8 *data);
int mig_scratch_write(const struct mig_device *dev, const struct mig_scratch *s,
		      const __u8 *data);

/* A stream, or part of a stream, in memory. */
struct mig_stream {
	__u8 *data;
	size_t len;
	size_t room;
};

void mig_stream_free(struct mig_stream *s);
int mig_stream_add(struct mig_stream *s, const void *data, size_t len);
int mig_stream_copy(struct mig_stream *to, const struct mig_stream *from);

/* Appends one read() of at most @max bytes: the number of bytes or -errno. */
ssize_t mig_read(int data_fd, struct mig_stream *s, size_t max);

/*
 * Reads to the end of the stream: 0 at a permanent end, -ENOMSG at a temporary
 * end, -EFBIG after @limit bytes without an end.
 */
int mig_save(int data_fd, struct mig_stream *s, size_t limit);

/*
 * Writes @len bytes in pieces of @chunk (0: in one piece). @done may be NULL; it
 * receives the number of bytes written.
 */
int mig_load(int data_fd, const void *data, size_t len, size_t chunk, size_t *done);

/* The events of one poll(), or -errno. */
int mig_poll(int data_fd, short events, int timeout_ms);

/* Has the session of this descriptor ended, so that calls return ENODEV? */
bool mig_fd_is_dead(int data_fd);

/* A process that uses descriptors received over a socket. */
struct mig_helper {
	pid_t pid;
	int sock;
};

int mig_helper_start(struct mig_helper *helper);
void mig_helper_stop(struct mig_helper *helper);
/* One read() or write() by that process: the number of bytes or -errno. */
ssize_t mig_helper_read(struct mig_helper *helper, int fd, void *data, size_t len);
ssize_t mig_helper_write(struct mig_helper *helper, int fd, const void *data,
			 size_t len);

/* The data of one of several readers, and the length of each read(). */
struct mig_pieces {
	struct mig_stream data;
	size_t *len;
	size_t nr;
};

ssize_t mig_pieces_read(int data_fd, struct mig_pieces *p, size_t max);

/*
 * Can the pieces of both readers, in the order of each reader, be merged to @whole?
 * 1 or 0, or -ENOMEM.
 */
int mig_pieces_make_up(const struct mig_stream *whole, const struct mig_pieces *a,
		       const struct mig_pieces *b);

/*
 * A page on which the kernel blocks until it is resolved, preceded by a page that
 * is always present.
 */
struct mig_stall {
	int uffd;
	void *page;
	size_t len;
};

/* -EOPNOTSUPP: this user cannot use userfaultfd. */
int mig_stall_start(struct mig_stall *stall);
/* Waits until a task has faulted on the page. */
int mig_stall_wait(struct mig_stall *stall);
/* Resolves the page with this content. */
int mig_stall_end(struct mig_stall *stall, const void *content);
/* The same without a wake-up: the task continues when it is woken otherwise. */
int mig_stall_fill(struct mig_stall *stall, const void *content);
/* Resolves the page with zeroes. */
int mig_stall_end_zero(struct mig_stall *stall);
void mig_stall_free(struct mig_stall *stall);

/* To be called once before mig_touch(). */
void mig_touch_begin(void);
/*
 * Returns the signal raised by a load, or by a store of the byte 0x5a, or 0. Makes
 * no system call.
 */
int mig_touch(void *at, bool write);

/*
 * Eight threads make @count random calls each to the device and its data_fd, all at
 * the same time: SET_STATE, RESET, GET, read(), write(), PRECOPY_INFO, poll() and
 * close of the data_fd, and region accesses. They also close the device, which the
 * caller has to open again. @why receives the call that failed with an unexpected
 * error, or an empty string.
 */
int mig_hammer(struct mig_device *dev, const struct mig_stream *image,
	       const struct mig_scratch *scratch, unsigned int count, __u32 seed,
	       char *why, size_t why_len);

/* The state machine, written from the text of the uAPI; see mig_fsm.c. */
bool mig_fsm_exists(__u64 flags, __u32 state);
bool mig_fsm_saving(__u32 state);

/*
 * Does SET_STATE from @from to @to succeed, and does it return a new data_fd?
 * @path may be NULL; it receives the states after @from, terminated by ERROR.
 */
bool mig_fsm_move(__u64 flags, __u32 from, __u32 to, bool *new_fd,
		  __u32 path[MIG_STATE_NR]);
const char *mig_state_name(__u32 state);

#endif /* MIG_H */

// SPDX-License-Identifier: GPL-2.0
/*
 * To be preloaded: multiplies the timeouts of poll(). kselftest_harness.h waits for each
 * test in this function, for 30 seconds by default, which is not enough on a busy machine
 * that emulates the test machine.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PATIENCE	20

int poll(struct pollfd *fds, nfds_t count, int timeout)
{
	if (timeout > 0)
		timeout *= PATIENCE;
	return syscall(SYS_poll, fds, count, timeout);
}

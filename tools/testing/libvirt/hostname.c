// SPDX-License-Identifier: GPL-2.0
/*
 * Sets the host name of a libvirt daemon to TEST_HOSTNAME. libvirt refuses to
 * migrate to a host with the same name, and the test kernel has no UTS namespaces.
 * Loaded into the daemon with LD_PRELOAD.
 */

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int gethostname(char *name, size_t size)
{
	const char *test = getenv("TEST_HOSTNAME");

	snprintf(name, size, "%s", test ? test : "localhost");
	return 0;
}

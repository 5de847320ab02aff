// SPDX-License-Identifier: GPL-2.0
/*
 * Gives a libvirt daemon the host name in TEST_HOSTNAME: libvirt migrates nothing
 * to a host of the same name, and the test kernel has no UTS namespaces. Loaded
 * into the daemon by LD_PRELOAD.
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

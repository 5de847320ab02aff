// SPDX-License-Identifier: GPL-2.0
/* The operations of devices: those in this program, and those in shared objects. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "mig_ops.h"

static struct mig_ops *latest;

void mig_ops_add(struct mig_ops *ops)
{
	ops->next = latest;
	latest = ops;
}

const struct mig_ops *mig_ops_find(const char *name)
{
	const struct mig_ops *ops = latest;

	if (strchr(name, '/')) {
		if (dlopen(name, RTLD_NOW) && latest != ops)
			return latest;
		fprintf(stderr, "%s: %s\n", name, dlerror() ?: "no MIG_OPS()");
		return NULL;
	}
	while (ops && strcmp(ops->name, name))
		ops = ops->next;
	if (!ops)
		fprintf(stderr, "no operations for %s\n", name);
	return ops;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * A model of the migration state machine, written only from the text above enum
 * vfio_device_mig_state in include/uapi/linux/vfio.h: the arcs listed in the text,
 * and a search for the shortest path.
 */
#include "kselftest.h"
#include "mig.h"

#define ERROR		VFIO_DEVICE_STATE_ERROR
#define STOP		VFIO_DEVICE_STATE_STOP
#define RUNNING		VFIO_DEVICE_STATE_RUNNING
#define STOP_COPY	VFIO_DEVICE_STATE_STOP_COPY
#define RESUMING	VFIO_DEVICE_STATE_RESUMING
#define RUNNING_P2P	VFIO_DEVICE_STATE_RUNNING_P2P
#define PRE_COPY	VFIO_DEVICE_STATE_PRE_COPY
#define PRE_COPY_P2P	VFIO_DEVICE_STATE_PRE_COPY_P2P

/* "The driver implements the following behavior for the FSM arcs" */
static const struct {
	__u32 from;
	__u32 to;
	bool new_fd;	/* "... and will return a new data_fd" */
} arcs[] = {
	{ RUNNING_P2P, STOP, false },
	{ STOP_COPY, STOP, false },
	{ RESUMING, STOP, false },
	{ PRE_COPY, RUNNING, false },
	{ RUNNING_P2P, RUNNING, false },
	{ PRE_COPY_P2P, RUNNING_P2P, false },
	{ RUNNING, RUNNING_P2P, false },
	{ STOP, RUNNING_P2P, false },
	{ RUNNING, PRE_COPY, true },
	{ RUNNING_P2P, PRE_COPY_P2P, true },
	{ STOP, STOP_COPY, true },
	{ PRE_COPY, PRE_COPY_P2P, false },
	{ PRE_COPY_P2P, PRE_COPY, false },
	{ PRE_COPY_P2P, STOP_COPY, false },
	{ STOP, RESUMING, true },
};

static bool has(__u64 flags, __u64 flag)
{
	return (flags & flag) == flag;
}

/*
 * "For the purpose of specification the states behave as though the device was
 * fully running if not supported": without P2P, the P2P states are their
 * running counterparts.
 */
static __u32 fold(__u64 flags, __u32 state)
{
	if (has(flags, VFIO_MIGRATION_P2P))
		return state;
	if (state == RUNNING_P2P)
		return RUNNING;
	if (state == PRE_COPY_P2P)
		return PRE_COPY;
	return state;
}

/* The states that are valid for SET_STATE on this device. */
bool mig_fsm_exists(__u64 flags, __u32 state)
{
	switch (state) {
	case STOP:
	case RUNNING:
	case STOP_COPY:
	case RESUMING:
		return has(flags, VFIO_MIGRATION_STOP_COPY);
	case RUNNING_P2P:
		return has(flags, VFIO_MIGRATION_P2P);
	case PRE_COPY:
		return has(flags, VFIO_MIGRATION_PRE_COPY);
	case PRE_COPY_P2P:
		return has(flags, VFIO_MIGRATION_PRE_COPY | VFIO_MIGRATION_P2P);
	}
	/* "ERROR cannot be specified as a device state" */
	return false;
}

/* "PRE_COPY, PRE_COPY_P2P and STOP_COPY form the "saving group" of states" */
bool mig_fsm_saving(__u32 state)
{
	return state == PRE_COPY || state == PRE_COPY_P2P || state == STOP_COPY;
}

bool mig_fsm_move(__u64 flags, __u32 from, __u32 to, bool *new_fd,
		  __u32 path[MIG_STATE_NR])
{
	bool within = mig_fsm_saving(from) && mig_fsm_saving(to);
	__u32 queue[MIG_STATE_NR], prev[MIG_STATE_NR] = {};
	bool fd[MIG_STATE_NR] = {};
	unsigned int head = 0, tail = 0, i, n;
	__u32 a, b, s;

	*new_fd = false;
	if (path)
		path[0] = ERROR;
	if (!mig_fsm_exists(flags, from) || !mig_fsm_exists(flags, to))
		return false;
	if (from == to)
		return true;

	/* "These arcs are not permitted and return error if requested" */
	if (from == STOP_COPY && (to == PRE_COPY || to == PRE_COPY_P2P))
		return false;

	queue[tail++] = from;
	prev[from] = from;
	while (head < tail) {
		s = queue[head++];
		/*
		 * "The path cannot have saving group states as interior arcs,
		 * only starting/end states"; a path inside the group is all
		 * start and end.
		 */
		if (s != from && mig_fsm_saving(s) && !within)
			continue;
		for (i = 0; i < ARRAY_SIZE(arcs); i++) {
			a = fold(flags, arcs[i].from);
			b = fold(flags, arcs[i].to);
			if (a != s || a == b || prev[b])
				continue;
			/*
			 * "Arcs touching PRE_COPY and PRE_COPY_P2P are removed
			 * if support for PRE_COPY is not present."
			 */
			if (!mig_fsm_exists(flags, b))
				continue;
			prev[b] = s;
			fd[b] = arcs[i].new_fd;
			queue[tail++] = b;
		}
	}
	if (!prev[to])
		return false;

	*new_fd = fd[to];
	if (path) {
		for (n = 0, s = to; s != from; s = prev[s])
			n++;
		path[n] = ERROR;
		for (s = to; s != from; s = prev[s])
			path[--n] = s;
	}
	return true;
}

const char *mig_state_name(__u32 state)
{
	static const char *const names[] = {
		[ERROR] = "ERROR",
		[STOP] = "STOP",
		[RUNNING] = "RUNNING",
		[STOP_COPY] = "STOP_COPY",
		[RESUMING] = "RESUMING",
		[RUNNING_P2P] = "RUNNING_P2P",
		[PRE_COPY] = "PRE_COPY",
		[PRE_COPY_P2P] = "PRE_COPY_P2P",
	};

	return state < MIG_STATE_NR ? names[state] : "(no state)";
}

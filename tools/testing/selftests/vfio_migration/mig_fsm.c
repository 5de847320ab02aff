// SPDX-License-Identifier: GPL-2.0
/*
 * A model of the migration state machine, written only from the text above enum
 * vfio_device_mig_state in include/uapi/linux/vfio.h: the arcs listed in the text,
 * and a search for the shortest path.
 */
#include "kselftest.h"
#include "mig.h"

/* "The driver implements the following behavior for the FSM arcs" */
static const struct {
	__u32 from;
	__u32 to;
	bool new_fd;	/* "... and will return a new data_fd" */
} arcs[] = {
	{ MIG_RUNNING_P2P, MIG_STOP, false },
	{ MIG_STOP_COPY, MIG_STOP, false },
	{ MIG_RESUMING, MIG_STOP, false },
	{ MIG_PRE_COPY, MIG_RUNNING, false },
	{ MIG_RUNNING_P2P, MIG_RUNNING, false },
	{ MIG_PRE_COPY_P2P, MIG_RUNNING_P2P, false },
	{ MIG_RUNNING, MIG_RUNNING_P2P, false },
	{ MIG_STOP, MIG_RUNNING_P2P, false },
	{ MIG_RUNNING, MIG_PRE_COPY, true },
	{ MIG_RUNNING_P2P, MIG_PRE_COPY_P2P, true },
	{ MIG_STOP, MIG_STOP_COPY, true },
	{ MIG_PRE_COPY, MIG_PRE_COPY_P2P, false },
	{ MIG_PRE_COPY_P2P, MIG_PRE_COPY, false },
	{ MIG_PRE_COPY_P2P, MIG_STOP_COPY, false },
	{ MIG_STOP, MIG_RESUMING, true },
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
	if (state == MIG_RUNNING_P2P)
		return MIG_RUNNING;
	if (state == MIG_PRE_COPY_P2P)
		return MIG_PRE_COPY;
	return state;
}

/* The states that are valid for SET_STATE on this device. */
bool mig_fsm_exists(__u64 flags, __u32 state)
{
	switch (state) {
	case MIG_STOP:
	case MIG_RUNNING:
	case MIG_STOP_COPY:
	case MIG_RESUMING:
		return has(flags, VFIO_MIGRATION_STOP_COPY);
	case MIG_RUNNING_P2P:
		return has(flags, VFIO_MIGRATION_P2P);
	case MIG_PRE_COPY:
		return has(flags, VFIO_MIGRATION_PRE_COPY);
	case MIG_PRE_COPY_P2P:
		return has(flags, VFIO_MIGRATION_PRE_COPY | VFIO_MIGRATION_P2P);
	}
	/* "ERROR cannot be specified as a device state" */
	return false;
}

/* "PRE_COPY, PRE_COPY_P2P and STOP_COPY form the "saving group" of states" */
bool mig_fsm_saving(__u32 state)
{
	return state == MIG_PRE_COPY || state == MIG_PRE_COPY_P2P || state == MIG_STOP_COPY;
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
		path[0] = MIG_ERROR;
	if (!mig_fsm_exists(flags, from) || !mig_fsm_exists(flags, to))
		return false;
	if (from == to)
		return true;

	/* "These arcs are not permitted and return error if requested" */
	if (from == MIG_STOP_COPY && (to == MIG_PRE_COPY || to == MIG_PRE_COPY_P2P))
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
		path[n] = MIG_ERROR;
		for (s = to; s != from; s = prev[s])
			path[--n] = s;
	}
	return true;
}

const char *mig_state_name(__u32 state)
{
	static const char *const names[] = {
		[MIG_ERROR] = "ERROR",
		[MIG_STOP] = "STOP",
		[MIG_RUNNING] = "RUNNING",
		[MIG_STOP_COPY] = "STOP_COPY",
		[MIG_RESUMING] = "RESUMING",
		[MIG_RUNNING_P2P] = "RUNNING_P2P",
		[MIG_PRE_COPY] = "PRE_COPY",
		[MIG_PRE_COPY_P2P] = "PRE_COPY_P2P",
	};

	return state < MIG_STATE_NR ? names[state] : "(no state)";
}

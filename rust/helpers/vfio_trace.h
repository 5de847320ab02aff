/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of the migration engine. Each module that the crate is linked into has
 * its own, in a system with the name of the module.
 */

#undef TRACE_SYSTEM
#define TRACE_SYSTEM VFIO_TRACE_SYSTEM

#if !defined(RUST_HELPERS_VFIO_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define RUST_HELPERS_VFIO_TRACE_H

#include <linux/tracepoint.h>

/* One arc, its result, and its duration in nanoseconds. */
TRACE_EVENT(vfio_arc,
	TP_PROTO(const char *device, const char *from, const char *to, int result,
		 u64 ns),
	TP_ARGS(device, from, to, result, ns),
	TP_STRUCT__entry(
		__string(device, device)
		__string(from, from)
		__string(to, to)
		__field(int, result)
		__field(u64, ns)
	),
	TP_fast_assign(
		__assign_str(device);
		__assign_str(from);
		__assign_str(to);
		__entry->result = result;
		__entry->ns = ns;
	),
	TP_printk("device=%s from=%s to=%s result=%d ns=%llu", __get_str(device),
		  __get_str(from), __get_str(to), __entry->result, __entry->ns)
);

/* VFIO_DEVICE_RESET, or another reset that the engine completes. */
TRACE_EVENT(vfio_reset,
	TP_PROTO(const char *device, const char *from, int result),
	TP_ARGS(device, from, result),
	TP_STRUCT__entry(
		__string(device, device)
		__string(from, from)
		__field(int, result)
	),
	TP_fast_assign(
		__assign_str(device);
		__assign_str(from);
		__entry->result = result;
	),
	TP_printk("device=%s from=%s result=%d", __get_str(device),
		  __get_str(from), __entry->result)
);

DECLARE_EVENT_CLASS(vfio_session,
	TP_PROTO(const char *device, const char *state),
	TP_ARGS(device, state),
	TP_STRUCT__entry(
		__string(device, device)
		__string(state, state)
	),
	TP_fast_assign(
		__assign_str(device);
		__assign_str(state);
	),
	TP_printk("device=%s state=%s", __get_str(device), __get_str(state))
);

DEFINE_EVENT(vfio_session, vfio_session_begin,
	TP_PROTO(const char *device, const char *state),
	TP_ARGS(device, state)
);

DEFINE_EVENT(vfio_session, vfio_session_end,
	TP_PROTO(const char *device, const char *state),
	TP_ARGS(device, state)
);

/* A call, and its return value. */
DECLARE_EVENT_CLASS(vfio_call,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result),
	TP_STRUCT__entry(
		__string(device, device)
		__field(s64, result)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->result = result;
	),
	TP_printk("device=%s result=%lld", __get_str(device), __entry->result)
);

/* read(): bytes, 0 at the permanent end of stream, -ENOMSG at a temporary one. */
DEFINE_EVENT(vfio_call, vfio_read,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result)
);

DEFINE_EVENT(vfio_call, vfio_write,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result)
);

/* A successful VFIO_MIG_GET_PRECOPY_INFO. */
TRACE_EVENT(vfio_precopy_info,
	TP_PROTO(const char *device, u64 initial, u64 dirty, u32 flags),
	TP_ARGS(device, initial, dirty, flags),
	TP_STRUCT__entry(
		__string(device, device)
		__field(u64, initial)
		__field(u64, dirty)
		__field(u32, flags)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->initial = initial;
		__entry->dirty = dirty;
		__entry->flags = flags;
	),
	TP_printk("device=%s initial_bytes=%llu dirty_bytes=%llu flags=%#x",
		  __get_str(device), __entry->initial, __entry->dirty, __entry->flags)
);

DEFINE_EVENT(vfio_call, vfio_log_start,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result)
);

DEFINE_EVENT(vfio_call, vfio_log_report,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result)
);

DEFINE_EVENT(vfio_call, vfio_log_stop,
	TP_PROTO(const char *device, s64 result),
	TP_ARGS(device, result)
);

#endif /* RUST_HELPERS_VFIO_TRACE_H */

#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE vfio_trace
/* This part must be outside protection */
#include <trace/define_trace.h>

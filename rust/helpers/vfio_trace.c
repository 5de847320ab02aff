// SPDX-License-Identifier: GPL-2.0
/*
 * Defines the tracepoints of a module. VFIO_TRACE_SYSTEM is the name of the module.
 */

#define CREATE_TRACE_POINTS
#include "vfio_trace.h"

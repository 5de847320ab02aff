/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Fault injection: each failure point of an operation fails in turn, by
 * /proc/thread-self/fail-nth. After that all points from the Nth on fail, by
 * /proc/thread-self/make-it-fail: a failed allocation may be retried in another
 * way, as SLUB does with smaller slabs.
 */
#ifndef MOCK_FAIL_H
#define MOCK_FAIL_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mig_test.h"

/* Upper bound for the number of failure points of an operation. */
#define MOST_FAILURES	5000U

/* Sets a knob in debugfs, if it exists. */
static inline int knob(const char *attribute, const char *name, const char *value)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/kernel/debug/%s/%s", attribute, name);
	return write_word(path, value);
}

/* The fault injection files of a thread. */
struct injector {
	int nth;
	int all;
};

static inline void injector_close(const struct injector *in)
{
	close(in->nth);
	close(in->all);
}

/* Opens the files in a directory of /proc; -errno if there are none. */
static inline int injector_open(struct injector *in, const char *folder)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/fail-nth", folder);
	in->nth = open(path, O_RDWR | O_CLOEXEC);
	if (in->nth < 0)
		return -errno;
	snprintf(path, sizeof(path), "%s/make-it-fail", folder);
	in->all = open(path, O_RDWR | O_CLOEXEC);
	return in->all < 0 ? -errno : 0;
}

struct nth {
	struct __test_metadata *_metadata;
	const char *what;
	const struct injector *in;
	unsigned int n;
	unsigned int stride;	/* the numbers of two rounds differ by this */
	bool all;		/* fail from the Nth on, not only the Nth */
	bool single;		/* never do that */
	bool injected;
	int ret;
	int also;		/* another valid errno of the operation */
};

static inline void nth_write(const struct nth *nth, int fd, unsigned int number)
{
	struct __test_metadata *_metadata = nth->_metadata;
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", number);
	ssize_t ret = pwrite(fd, text, len, 0);

	/* The injected failure may have hit this write. */
	if (ret < 0 && errno == EFAULT)
		ret = pwrite(fd, text, len, 0);
	ASSERT_EQ(len, ret)
		STEP("make the thread fail: %s", strerror(errno));
}

static inline void nth_start(struct nth *nth, struct __test_metadata *_metadata,
			     const char *what, const struct injector *in, bool single)
{
	*nth = (struct nth){
		._metadata = _metadata, .what = what, .in = in, .single = single,
		.stride = 1,
	};
}

/* Begins the next round; false if nothing failed in the last one. */
static inline bool nth_next(struct nth *nth)
{
	struct __test_metadata *_metadata = nth->_metadata;

	if (nth->n && !nth->injected) {
		EXPECT_EQ(0, nth->ret)
			PROMISE("%s succeeds without failures: %s", nth->what,
				strerror(-nth->ret));
		EXPECT_LT(1U, nth->n)
			TH_LOG("  %s had no failure at all", nth->what);
		TH_LOG("  %s: %u %s", nth->what, (nth->n - 1) / nth->stride,
		       nth->all ? "first failures" : "failures");
		if (nth->all || nth->single)
			return false;
		nth->all = true;
		nth->n = 0;
	}
	nth->n += nth->n ? nth->stride : 1;
	ASSERT_GT(MOST_FAILURES, nth->n)
		TH_LOG("  %s fails in every round", nth->what);
	return true;
}

/* Starts injection: the Nth failure point of this thread fails. */
static inline void nth_begin(struct nth *nth)
{
	/* The points before the Nth succeed. */
	if (nth->all)
		nth_write(nth, nth->in->all, 1);
	nth_write(nth, nth->in->nth, nth->n);
}

/* Stops injection. @ret is the result of the operation. */
static inline void nth_end(struct nth *nth, int ret)
{
	struct __test_metadata *_metadata = nth->_metadata;
	char text[16] = {};

	/* The failure that takes the count to 0 may be in this read. */
	if (pread(nth->in->nth, text, sizeof(text) - 1, 0) < 0) {
		ASSERT_EQ(EFAULT, errno);
		nth->injected = false;
	} else {
		nth->injected = atoi(text) == 0;
	}
	if (nth->all)
		nth_write(nth, nth->in->all, 0);
	nth_write(nth, nth->in->nth, 0);
	nth->ret = ret;
	if (ret) {
		EXPECT_TRUE(ret == -ENOMEM || ret == -EFAULT || ret == nth->also)
			PROMISE("%s, failure %u: ENOMEM or EFAULT, not %s", nth->what,
				nth->n, strerror(-ret));
		EXPECT_TRUE(nth->injected)
			PROMISE("%s, failure %u: no error without an injected failure", nth->what,
				nth->n);
	}
}

#define for_each_failure(nth, text) \
	for (nth_start(nth, _metadata, text, &self->in, false); nth_next(nth);)

/* For operations that retry until they succeed. */
#define for_each_single_failure(nth, text) \
	for (nth_start(nth, _metadata, text, &self->in, true); nth_next(nth);)

/* The kinds of injected failures, directories in debugfs. */
static const char *const fail_attributes[] = {
	"failslab", "fail_page_alloc", "fail_usercopy",
};

static inline void fail_set_all(const char *name, const char *value)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(fail_attributes); i++)
		knob(fail_attributes[i], name, value);
}

/* The addresses of a function and of the next one. */
static inline bool find_function(const char *name, unsigned long long *start,
				 unsigned long long *end)
{
	char line[512], symbol[256], kind;
	unsigned long long at;
	FILE *file = fopen("/proc/kallsyms", "r");

	*start = 0;
	*end = ~0ULL;
	while (file && fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%llx %c %255s", &at, &kind, symbol) == 3 &&
		    !strcmp(symbol, name))
			*start = at;
	}
	if (file)
		rewind(file);
	while (file && fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%llx %c %255s", &at, &kind, symbol) == 3 &&
		    at > *start && at < *end)
			*end = at;
	}
	if (file)
		fclose(file);
	return *start && *end != ~0ULL;
}

/*
 * Limits failures by the call chain. With the rule "reject", nothing fails in @function or
 * below it; with "require", nothing fails elsewhere. Returns NULL, or the reason why
 * failures cannot be limited.
 */
static inline const char *fail_limit(const char *attribute, const char *rule,
				     const char *function)
{
	unsigned long long start, end;
	char path[64], text[32];
	FILE *file;

	/* Set by an earlier test, for the same function: the search takes long. */
	snprintf(path, sizeof(path), "/sys/kernel/debug/%s/%s-start", attribute, rule);
	file = fopen(path, "r");
	start = 0;
	if (file && fscanf(file, "%llx", &start) != 1)
		start = 0;
	if (file)
		fclose(file);
	if (start)
		return NULL;
	if (knob(attribute, "stacktrace-depth", "32"))
		return "the kernel has no CONFIG_FAULT_INJECTION_STACKTRACE_FILTER";
	if (!find_function(function, &start, &end))
		return "the function that limits failures is not in /proc/kallsyms";
	snprintf(path, sizeof(path), "%s-start", rule);
	snprintf(text, sizeof(text), "%llu", start);
	knob(attribute, path, text);
	snprintf(path, sizeof(path), "%s-end", rule);
	snprintf(text, sizeof(text), "%llu", end);
	knob(attribute, path, text);
	return NULL;
}

/* Ends the limits of a test, which may have been killed. */
static inline void fail_unlimit(const char *attribute)
{
	knob(attribute, "reject-start", "0");
	knob(attribute, "reject-end", "0");
	knob(attribute, "require-start", "0");
	knob(attribute, "require-end", "18446744073709551615");
}

/* Enables all kinds of failures in this thread; 0, or -1 and the reason. */
static inline int fail_open(struct injector *in, const char **why)
{
	if (injector_open(in, "/proc/thread-self")) {
		*why = "the kernel has no CONFIG_FAULT_INJECTION, or this is not root";
		return -1;
	}
	if (knob("failslab", "ignore-gfp-wait", "N")) {
		*why = "the kernel has no CONFIG_FAILSLAB, or debugfs is not mounted";
		return -1;
	}
	fail_unlimit("failslab");
	knob("fail_page_alloc", "ignore-gfp-wait", "N");
	knob("fail_page_alloc", "min-order", "0");
	/* SLUB may need pages in any allocation, independent of the operation. */
	*why = fail_limit("fail_page_alloc", "reject", "allocate_slab");
	if (*why)
		return -1;
	fail_set_all("verbose", "0");
	fail_set_all("task-filter", "Y");
	fail_set_all("times", "-1");
	/* A failed user copy is not retried: leave fail_usercopy's probability. */
	knob("failslab", "probability", "100");
	knob("fail_page_alloc", "probability", "100");
	return 0;
}

#endif /* MOCK_FAIL_H */

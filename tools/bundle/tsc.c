// SPDX-License-Identifier: GPL-2.0
/*
 * Prints the frequency of the time stamp counter of this machine in kHz. An emulated CPU
 * has the counter of the machine, but on a busy machine its kernel measures a wrong
 * frequency, and has wrong timeouts.
 */
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static int64_t nanoseconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* The closest of some pairs of time and counter. */
static void sample(int64_t *time, int64_t *ticks)
{
	int64_t best = INT64_MAX, before, counter, after;
	int i;

	for (i = 0; i < 20; i++) {
		before = nanoseconds();
		counter = __rdtsc();
		after = nanoseconds();
		if (after - before < best) {
			best = after - before;
			*time = before;
			*ticks = counter;
		}
	}
}

int main(void)
{
	const struct timespec wait = { .tv_nsec = 100000000 };
	int64_t start = 0, end = 0, first = 0, last = 0;

	sample(&start, &first);
	nanosleep(&wait, NULL);
	sample(&end, &last);
	printf("%lld\n", (long long)((last - first) * 1000000.0 / (end - start)));
	return 0;
}

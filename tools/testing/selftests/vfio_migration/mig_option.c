// SPDX-License-Identifier: GPL-2.0
/*
 * Options of the test programs: "--name value", besides those of kselftest_harness.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mig.h"

static struct mig_option common[] = {
	{ .name = "rounds", .argument = "N", .number = true,
	  .help = "factor for the number of repetitions" },
	{ .name = "hang", .argument = "SECONDS", .number = true,
	  .help = "time limit for operations that must not wait (20)" },
	{ .name = "patience", .argument = "N", .number = true,
	  .help = "factor for the default time limits" },
	{ .name = "fixed",
	  .help = "the kernel has none of the faults that tests avoid" },
	{}
};

static struct mig_option *specific;

static struct mig_option *find(const char *name)
{
	struct mig_option *o;

	for (o = specific; o && o->name; o++)
		if (!strcmp(o->name, name))
			return o;
	for (o = common; o->name; o++)
		if (!strcmp(o->name, name))
			return o;
	return NULL;
}

static void print_options(FILE *file, const struct mig_option *o)
{
	char text[64];

	for (; o && o->name; o++) {
		snprintf(text, sizeof(text), "--%s %s", o->name,
			 o->argument ? o->argument : "");
		fprintf(file, "  %-32s %s\n", text, o->help);
	}
}

static void __attribute__((noreturn)) usage(const char *program, bool asked)
{
	FILE *file = asked ? stdout : stderr;

	fprintf(file, "Usage: %s [argument...]; -h lists the options of the harness\n", program);
	print_options(file, specific);
	print_options(file, common);
	exit(asked ? 0 : 1);
}

static bool is_number(const char *text)
{
	char *end;

	strtoul(text, &end, 0);
	return end != text && !*end && *text != '-';
}

int mig_take_options(int argc, char **argv, struct mig_option *options)
{
	struct mig_option *o;
	int i, n = 1;

	specific = options;
	for (i = 1; i < argc; i++) {
		if (strncmp(argv[i], "--", 2)) {
			argv[n++] = argv[i];
			continue;
		}
		o = find(argv[i] + 2);
		if (!o || (o->argument && i + 1 == argc))
			usage(argv[0], !strcmp(argv[i], "--help"));
		o->value = o->argument ? argv[++i] : "";
		if (o->number && !is_number(o->value)) {
			fprintf(stderr, "--%s %s: not a number\n", o->name, o->value);
			exit(1);
		}
	}
	argv[n] = NULL;
	return n;
}

const char *mig_option(const char *name)
{
	struct mig_option *o = find(name);

	return o ? o->value : NULL;
}

unsigned long mig_number(const char *name, unsigned long otherwise)
{
	const char *value = mig_option(name);
	unsigned long n = value ? strtoul(value, NULL, 0) : 0;

	return n ? n : otherwise;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Reports errors of PCI devices to their drivers, for tests: the part of the AER driver
 * in front of a driver. "ADDRESS NUMBER", written to the parameter "report", sets the
 * state of the device to that with this index in states[], and calls its driver like
 * report_error_detected().
 */

#include <linux/module.h>
#include <linux/pci.h>

static const pci_channel_state_t states[] = {
	pci_channel_io_normal,
	pci_channel_io_frozen,
	pci_channel_io_perm_failure,
};

static int report(const char *text, const struct kernel_param *param)
{
	unsigned int domain, bus, slot, function, number;
	const struct pci_error_handlers *handlers = NULL;
	struct pci_dev *pdev;
	int done = -ENODEV;

	if (sscanf(text, "%x:%x:%x.%x %u", &domain, &bus, &slot, &function, &number) != 5)
		return -EINVAL;
	if (number >= ARRAY_SIZE(states))
		return -EINVAL;
	pdev = pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(slot, function));
	if (!pdev)
		return -ENODEV;
	device_lock(&pdev->dev);
	pdev->error_state = states[number];
	if (pdev->driver)
		handlers = pdev->driver->err_handler;
	if (handlers && handlers->error_detected) {
		handlers->error_detected(pdev, states[number]);
		done = 0;
	}
	device_unlock(&pdev->dev);
	pci_dev_put(pdev);
	return done;
}

static const struct kernel_param_ops report_ops = {
	.set = report,
};

module_param_cb(report, &report_ops, NULL, 0200);
/* sparse cannot evaluate __builtin_strlen(). */
#ifndef __CHECKER__
MODULE_PARM_DESC(report, "address of a device and the state to report");

MODULE_AUTHOR("The vfio_mock authors");
MODULE_DESCRIPTION("Errors of PCI devices for tests");
MODULE_LICENSE("GPL");
#endif

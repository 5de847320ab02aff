// SPDX-License-Identifier: GPL-2.0
/*
 * Events of PCI devices that no program can cause, for tests. Each parameter is
 * written.
 *
 * report, "ADDRESS NUMBER": sets the state of the device to that with this index in
 * states[], and calls its driver like report_error_detected(), the part of the AER
 * driver in front of a driver.
 *
 * claim, "ADDRESS 1": the only device of a bus claims to support FLR, and power
 * management with D3hot, until "ADDRESS 0". FLR and D3hot have no effect. The kernel
 * notices when it finds the device again.
 *
 * follow, a virtual address: finds the page there, like KVM for a guest that writes. A
 * page that is unmapped within a second after its page fault is not found.
 */

#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>

static const pci_channel_state_t states[] = {
	pci_channel_io_normal,
	pci_channel_io_frozen,
	pci_channel_io_perm_failure,
};

/* Returns the device and the number in a text, or NULL. */
static struct pci_dev *find(const char *text, unsigned int *number)
{
	unsigned int domain, bus, slot, function;

	if (sscanf(text, "%x:%x:%x.%x %u", &domain, &bus, &slot, &function, number) != 5)
		return NULL;
	return pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(slot, function));
}

static int report(const char *text, const struct kernel_param *param)
{
	const struct pci_error_handlers *handlers = NULL;
	unsigned int number;
	struct pci_dev *pdev = find(text, &number);
	int done = -ENODEV;

	if (!pdev)
		return -ENODEV;
	if (number >= ARRAY_SIZE(states)) {
		pci_dev_put(pdev);
		return -EINVAL;
	}
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

static const struct kernel_param_ops report_param_ops = {
	.set = report,
};

/* Place of the capability, which bochs-display does not use. */
#define PM_CAP 0x50

static struct pci_ops *plain_ops;
static struct pci_ops claim_ops;
/* The offset of the real capability, and the power state of the device of each bus. */
static u8 pcie_cap;
static u8 power_states[256];

static u8 claim_byte(struct pci_bus *bus, int where, u8 byte)
{
	switch (where) {
	case PCI_CAPABILITY_LIST:
		return PM_CAP;
	case PM_CAP:
		return PCI_CAP_ID_PM;
	case PM_CAP + PCI_CAP_LIST_NEXT:
		return pcie_cap;
	case PM_CAP + PCI_PM_PMC:
		return 3;
	case PM_CAP + PCI_PM_CTRL:
		return power_states[bus->number];
	}
	return where == pcie_cap + PCI_EXP_DEVCAP + 3 ? byte | PCI_EXP_DEVCAP_FLR >> 24 : byte;
}

static int claim_read(struct pci_bus *bus, unsigned int devfn, int where, int size, u32 *value)
{
	int done = plain_ops->read(bus, devfn, where, size, value);
	int shift;

	for (shift = 0; shift < 8 * size; shift += 8) {
		u32 byte = claim_byte(bus, where + shift / 8, *value >> shift);

		*value = (*value & ~(0xffU << shift)) | byte << shift;
	}
	return done;
}

static int claim_write(struct pci_bus *bus, unsigned int devfn, int where, int size, u32 value)
{
	if (where != PM_CAP + PCI_PM_CTRL)
		return plain_ops->write(bus, devfn, where, size, value);
	power_states[bus->number] = value & PCI_PM_CTRL_STATE_MASK;
	return 0;
}

static int claim(const char *text, const struct kernel_param *param)
{
	unsigned int on;
	struct pci_dev *pdev = find(text, &on);

	if (!pdev)
		return -ENODEV;
	if (!plain_ops) {
		pcie_cap = pci_pcie_cap(pdev);
		plain_ops = pdev->bus->ops;
		claim_ops = *plain_ops;
		claim_ops.read = claim_read;
		claim_ops.write = claim_write;
	}
	pci_bus_set_ops(pdev->bus, on ? &claim_ops : plain_ops);
	pci_dev_put(pdev);
	return 0;
}

static const struct kernel_param_ops claim_param_ops = {
	.set = claim,
};

/* Returns 0 if a page is mapped, or an error. */
static int is_mapped(struct vm_area_struct *vma, unsigned long address)
{
	struct follow_pfnmap_args args = { .vma = vma, .address = address };
	int done = follow_pfnmap_start(&args);

	if (!done)
		follow_pfnmap_end(&args);
	return done;
}

/* Like hva_to_pfn_remapped(), but slow. Returns -EAGAIN where that begins again. */
static int follow_once(unsigned long address)
{
	struct vm_area_struct *vma = vma_lookup(current->mm, address);
	bool unlocked = false;
	int done, round;

	if (!vma || !(vma->vm_flags & VM_PFNMAP))
		return -EINVAL;
	done = is_mapped(vma, address);
	if (!done)
		return 0;
	done = fixup_user_fault(current->mm, address, FAULT_FLAG_WRITE, &unlocked);
	if (unlocked)
		return -EAGAIN;
	for (round = 0; !done && round < 50; round++) {
		msleep(20);
		done = is_mapped(vma, address);
	}
	return done;
}

static int follow(const char *text, const struct kernel_param *param)
{
	unsigned long address;
	int done = kstrtoul(text, 0, &address);

	if (done)
		return done;
	mmap_read_lock(current->mm);
	do {
		done = follow_once(address);
	} while (done == -EAGAIN);
	mmap_read_unlock(current->mm);
	return done;
}

static const struct kernel_param_ops follow_param_ops = {
	.set = follow,
};

module_param_cb(report, &report_param_ops, NULL, 0200);
module_param_cb(claim, &claim_param_ops, NULL, 0200);
module_param_cb(follow, &follow_param_ops, NULL, 0200);
/* sparse cannot evaluate __builtin_strlen(). */
#ifndef __CHECKER__
MODULE_PARM_DESC(report, "address of a device and the state to report");
MODULE_PARM_DESC(claim, "address of a device, and whether it claims more than it has");
MODULE_PARM_DESC(follow, "virtual address of a page to find");

MODULE_AUTHOR("The vfio_mock authors");
MODULE_DESCRIPTION("Events of PCI devices for tests");
MODULE_LICENSE("GPL");
#endif

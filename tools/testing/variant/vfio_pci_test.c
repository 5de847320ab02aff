// SPDX-License-Identifier: GPL-2.0
/*
 * Events of PCI devices that no program can cause, for tests. Each parameter is
 * written.
 *
 * report, "ADDRESS NUMBER": calls an error handler of the device's driver. Up to 2, sets
 * the state of the device to that with this index in states[] and calls error_detected,
 * like report_error_detected(), the part of the AER driver in front of a driver. Others
 * are in enum event.
 *
 * stall, "ADDRESS NUMBER": holds memory_lock of vfio-pci until a task waits for it, and
 * then until that event was reported. Fails with ETIMEDOUT if the driver waits for the
 * task. Reads as Y meanwhile.
 *
 * vanish, "ADDRESS 1": all registers in the configuration space of the only device of a
 * bus read as all ones after the next time that its memory is enabled, until "ADDRESS 0".
 *
 * claim, "ADDRESS 1": the only device of a bus claims to support FLR, and power
 * management with D3hot, until "ADDRESS 0". FLR and D3hot have no effect. The kernel
 * notices when it finds the device again.
 *
 * follow, a virtual address: finds the page there, like KVM for a guest that writes. A
 * page that is unmapped within a second after its page fault is not found.
 */

#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/vfio_pci_core.h>
#include <linux/workqueue.h>

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

enum event { SLOT_RESET = ARRAY_SIZE(states), RESET_PREPARE, RESET_DONE, EVENTS };

static int call(struct pci_dev *pdev, unsigned int event)
{
	static const struct pci_error_handlers none;
	const struct pci_error_handlers *handlers = &none;
	int done = 0;

	device_lock(&pdev->dev);
	if (pdev->driver && pdev->driver->err_handler)
		handlers = pdev->driver->err_handler;
	if (event < ARRAY_SIZE(states))
		pdev->error_state = states[event];
	if (event < ARRAY_SIZE(states) && handlers->error_detected)
		handlers->error_detected(pdev, states[event]);
	else if (event == SLOT_RESET && handlers->slot_reset)
		handlers->slot_reset(pdev);
	else if (event == RESET_PREPARE && handlers->reset_prepare)
		handlers->reset_prepare(pdev);
	else if (event == RESET_DONE && handlers->reset_done)
		handlers->reset_done(pdev);
	else
		done = -ENODEV;
	device_unlock(&pdev->dev);
	return done;
}

static int report(const char *text, const struct kernel_param *param)
{
	unsigned int event;
	struct pci_dev *pdev = find(text, &event);
	int done;

	if (!pdev)
		return -ENODEV;
	done = event < EVENTS ? call(pdev, event) : -EINVAL;
	pci_dev_put(pdev);
	return done;
}

static const struct kernel_param_ops report_param_ops = {
	.set = report,
};

/* A report in a task of its own. */
struct stall {
	struct work_struct work;
	struct completion reported;
	struct pci_dev *pdev;
	unsigned int event;
	int done;
};

static bool stalling;

static void stall_report(struct work_struct *work)
{
	struct stall *stall = container_of(work, struct stall, work);

	stall->done = call(stall->pdev, stall->event);
	complete(&stall->reported);
}

static int stall(const char *text, const struct kernel_param *param)
{
	struct vfio_pci_core_device *core;
	struct stall stall;
	int round, done = 0;

	stall.pdev = find(text, &stall.event);
	if (!stall.pdev)
		return -ENODEV;
	/* For stall_get(). */
	kernel_param_unlock(THIS_MODULE);
	INIT_WORK_ONSTACK(&stall.work, stall_report);
	init_completion(&stall.reported);
	core = dev_get_drvdata(&stall.pdev->dev);
	down_write(&core->memory_lock);
	stalling = true;
	for (round = 0; round < 3000 && !rwsem_is_contended(&core->memory_lock); round++)
		msleep(20);
	schedule_work(&stall.work);
	if (!wait_for_completion_timeout(&stall.reported, 60 * HZ))
		done = -ETIMEDOUT;
	stalling = false;
	up_write(&core->memory_lock);
	flush_work(&stall.work);
	destroy_work_on_stack(&stall.work);
	kernel_param_lock(THIS_MODULE);
	pci_dev_put(stall.pdev);
	return done ?: stall.done;
}

static int stall_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%c\n", stalling ? 'Y' : 'N');
}

static const struct kernel_param_ops stall_param_ops = {
	.set = stall,
	.get = stall_get,
};

/* Place of the capability, which bochs-display does not use. */
#define PM_CAP 0x50

static struct pci_ops *plain_ops;
static struct pci_ops claim_ops, vanish_ops;
static bool vanished;
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

static int vanish_read(struct pci_bus *bus, unsigned int devfn, int where, int size, u32 *value)
{
	if (!vanished)
		return plain_ops->read(bus, devfn, where, size, value);
	PCI_SET_ERROR_RESPONSE(value);
	return PCIBIOS_SUCCESSFUL;
}

static int vanish_write(struct pci_bus *bus, unsigned int devfn, int where, int size, u32 value)
{
	int done = plain_ops->write(bus, devfn, where, size, value);

	if (where == PCI_COMMAND && value & PCI_COMMAND_MEMORY)
		vanished = true;
	return done;
}

/* Replaces the operations of a device's bus, or restores them. */
static int set_ops(const char *text, struct pci_ops *ops)
{
	unsigned int on;
	struct pci_dev *pdev = find(text, &on);

	if (!pdev)
		return -ENODEV;
	if (!plain_ops) {
		plain_ops = pdev->bus->ops;
		claim_ops = *plain_ops;
		claim_ops.read = claim_read;
		claim_ops.write = claim_write;
		vanish_ops = *plain_ops;
		vanish_ops.read = vanish_read;
		vanish_ops.write = vanish_write;
	}
	vanished = false;
	/* Only bochs-display, whose place of the capability is always the same. */
	pcie_cap = pci_pcie_cap(pdev) ?: pcie_cap;
	pci_bus_set_ops(pdev->bus, on ? ops : plain_ops);
	pci_dev_put(pdev);
	return 0;
}

static int claim(const char *text, const struct kernel_param *param)
{
	return set_ops(text, &claim_ops);
}

static const struct kernel_param_ops claim_param_ops = {
	.set = claim,
};

static int vanish(const char *text, const struct kernel_param *param)
{
	return set_ops(text, &vanish_ops);
}

static const struct kernel_param_ops vanish_param_ops = {
	.set = vanish,
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
module_param_cb(stall, &stall_param_ops, NULL, 0600);
module_param_cb(vanish, &vanish_param_ops, NULL, 0200);
module_param_cb(claim, &claim_param_ops, NULL, 0200);
module_param_cb(follow, &follow_param_ops, NULL, 0200);
/* sparse cannot evaluate __builtin_strlen(). */
#ifndef __CHECKER__
MODULE_PARM_DESC(report, "address of a device and the event to report");
MODULE_PARM_DESC(stall, "the same while a task waits for memory_lock");
MODULE_PARM_DESC(vanish, "address of a device, and whether it vanishes");
MODULE_PARM_DESC(claim, "address of a device, and whether it claims more than it has");
MODULE_PARM_DESC(follow, "virtual address of a page to find");

MODULE_AUTHOR("The vfio_mock authors");
MODULE_DESCRIPTION("Events of PCI devices for tests");
MODULE_LICENSE("GPL");
#endif

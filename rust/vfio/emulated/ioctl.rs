// SPDX-License-Identifier: GPL-2.0

//! The ioctls of a device file that the core passes to the driver.
//!
//! C header: [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h)

use crate::{
    bindings,
    emulated::irq::{
        self,
        Irqs, //
    },
    region, //
};
use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// Serves an ioctl with the argument `arg`; `reset` resets the device. May sleep.
///
/// Fails with `ENOTTY` if there is no such ioctl.
pub(super) fn serve(
    cmd: u32,
    arg: usize,
    irqs: &Irqs,
    reset: impl FnOnce() -> Result, //
) -> Result {
    match cmd {
        bindings::VFIO_DEVICE_GET_INFO => get_info(arg),
        bindings::VFIO_DEVICE_GET_IRQ_INFO => get_irq_info(irqs, arg),
        bindings::VFIO_DEVICE_SET_IRQS => set_irqs(irqs, arg),
        bindings::VFIO_DEVICE_RESET => reset(),
        _ => Err(ENOTTY),
    }
}

/// Serves `VFIO_DEVICE_GET_INFO`.
fn get_info(arg: usize) -> Result {
    let size = size_of::<bindings::vfio_device_info>();
    let (mut reader, mut writer) = UserSlice::new(UserPtr::from_addr(arg), size).reader_writer();
    let argsz = reader.read::<u32>()?;
    if (argsz as usize) < 4 * size_of::<u32>() {
        return Err(EINVAL);
    }
    let flags = bindings::VFIO_DEVICE_FLAGS_PCI | bindings::VFIO_DEVICE_FLAGS_RESET;
    // There are no capabilities: `cap_offset` and the padding are zero.
    let info = [argsz, flags, region::COUNT, irq::COUNT, 0, 0].map(u32::to_ne_bytes);
    let info = info.as_flattened();
    writer.write_slice(&info[..info.len().min(argsz as usize)])
}

/// Serves `VFIO_DEVICE_GET_IRQ_INFO`.
fn get_irq_info(irqs: &Irqs, arg: usize) -> Result {
    let (mut reader, mut writer) =
        UserSlice::new(UserPtr::from_addr(arg), 4 * size_of::<u32>()).reader_writer();
    let argsz = reader.read::<u32>()?;
    let _flags = reader.read::<u32>()?;
    let index = reader.read::<u32>()?;
    if (argsz as usize) < 4 * size_of::<u32>() {
        return Err(EINVAL);
    }
    let (flags, count) = irqs.info(index)?;
    writer.write(&argsz)?;
    writer.write(&flags)?;
    writer.write(&index)?;
    writer.write(&count)
}

/// Serves `VFIO_DEVICE_SET_IRQS`.
fn set_irqs(irqs: &Irqs, arg: usize) -> Result {
    // The header has the size of the data that follows it.
    let mut reader = UserSlice::new(UserPtr::from_addr(arg), usize::MAX).reader();
    let request = irq::Request {
        argsz: reader.read()?,
        flags: reader.read()?,
        index: reader.read()?,
        start: reader.read()?,
        count: reader.read()?,
    };
    irqs.set(request, &mut reader)
}

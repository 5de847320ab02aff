// SPDX-License-Identifier: GPL-2.0

//! `#[vtable]` is required; without it, the implementation would have no owner module.

include!(env!("DRIVER"));

struct Device;

//~ error[E0046]: not all trait items implemented, missing: `USE_VTABLE_ATTR`, `OwnerModule`
impl emulated::Operations for Device {
    type OpenData = Chip;
    const NAME: &'static CStr = c"device";

    fn config_space(&self) -> Result<ConfigSpace> {
        Err(EINVAL)
    }

    fn open(&self, function: Arc<Function>) -> impl PinInit<Chip, Error> {
        try_pin_init!(Chip {
            function,
            registers <- new_mutex!(Registers::default()),
        }? Error)
    }

    fn read(_chip: &Chip, _pos: Position, _to: &mut [u8]) -> Result {
        Ok(())
    }

    fn write(_chip: &Chip, _pos: Position, _from: &[u8]) -> Result {
        Ok(())
    }
}

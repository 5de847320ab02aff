// SPDX-License-Identifier: GPL-2.0

//! String parameters of modules (`charp`). `module!` supports only integers.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use core::cell::UnsafeCell;
use kernel::prelude::*;

/// A parameter of a module that is a text, empty by default. See
/// [`module_text_param!`](crate::module_text_param).
///
/// # Invariants
///
/// The pointer is null, or a string that is freed after the exit of the module. It changes only
/// while the arguments of the module are parsed: before its init, or at boot.
#[repr(transparent)]
pub struct TextParam(UnsafeCell<*mut c_char>);

// SAFETY: By the type invariants, it does not change once code of the module runs.
unsafe impl Sync for TextParam {}

impl TextParam {
    #[doc(hidden)]
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        // INVARIANT: The pointer is null. Only `param_ops_charp` has its address. The kernel calls
        // its `set` while it parses the arguments, because the parameter is not in sysfs, and its
        // `free` in `free_module()`.
        Self(UnsafeCell::new(core::ptr::null_mut()))
    }

    #[doc(hidden)]
    pub const fn as_void_ptr(&self) -> *mut c_void {
        self.0.get().cast()
    }

    /// Returns the text. Takes no lock: there is no writer.
    pub fn value(&'static self) -> &'static CStr {
        // SAFETY: By the type invariants, nothing writes to it now: only code of the module, which
        // has this reference, calls this.
        let text = unsafe { *self.0.get() };
        if text.is_null() {
            return c"";
        }
        // SAFETY: By the type invariants, it is a string that lives as long as code of the module
        // runs.
        unsafe { CStr::from_char_ptr(text) }
    }
}

/// Returns the bytes of a text, for the information on a module.
#[doc(hidden)]
pub const fn to_bytes<const LEN: usize>(text: &str) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let mut at = 0;
    while at < LEN {
        bytes[at] = text.as_bytes()[at];
        at += 1;
    }
    bytes
}

/// Returns a text, followed by a null. It begins with the name of the module if the code is not a
/// loadable module.
#[doc(hidden)]
#[macro_export]
macro_rules! module_param_text {
    ($module:ident, $($part:expr),*) => {
        if cfg!(MODULE) {
            concat!($($part,)* "\0")
        } else {
            concat!(stringify!($module), ".", $($part,)* "\0")
        }
    };
}

/// Declares a [`TextParam`] of a module, with the name of the module, its own name and a
/// description.
///
/// # Examples
///
/// ```
/// vfio::module_text_param!(my_driver, greeting, "Text to log");
///
/// fn greet() {
///     pr_info!("{}\n", greeting.value());
/// }
/// ```
#[macro_export]
macro_rules! module_text_param {
    ($module:ident, $name:ident, $description:literal) => {
        #[allow(non_upper_case_globals)]
        static $name: $crate::module_param::TextParam = $crate::module_param::TextParam::new();

        const _: () = {
            const NAME: &str = $crate::module_param_text!($module, stringify!($name));
            const TYPE: &str =
                $crate::module_param_text!($module, "parmtype=", stringify!($name), ":charp");
            const TEXT: &str =
                $crate::module_param_text!($module, "parm=", stringify!($name), ":", $description);

            // Like `module!`: with `used` alone, the linker would see sections of two kinds.
            #[link_section = ".modinfo"]
            #[used(compiler)]
            static TYPE_INFO: [u8; TYPE.len()] = $crate::module_param::to_bytes(TYPE);

            #[link_section = ".modinfo"]
            #[used(compiler)]
            static TEXT_INFO: [u8; TEXT.len()] = $crate::module_param::to_bytes(TEXT);

            #[link_section = "__param"]
            #[used(compiler)]
            static PARAM: ::kernel::module_param::KernelParam =
                ::kernel::module_param::KernelParam::new(::kernel::bindings::kernel_param {
                    name: NAME.as_ptr().cast(),
                    // SAFETY: The module lives as long as the parameter.
                    #[cfg(MODULE)]
                    mod_: unsafe {
                        core::ptr::from_ref(&::kernel::bindings::__this_module).cast_mut()
                    },
                    #[cfg(not(MODULE))]
                    mod_: core::ptr::null_mut(),
                    ops: &raw const ::kernel::bindings::param_ops_charp,
                    // Not in sysfs, where it could be written.
                    perm: 0,
                    level: -1,
                    flags: 0,
                    __bindgen_anon_1: ::kernel::bindings::kernel_param__bindgen_ty_1 {
                        arg: $name.as_void_ptr(),
                    },
                });
        };
    };
}

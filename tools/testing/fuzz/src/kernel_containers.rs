// SPDX-License-Identifier: GPL-2.0

//! Replacement for the parts of the kernel crate that the sources use, with allocations that fail
//! on request of a target.

/// Like in the kernel.
pub mod alloc {
    /// Allocation flags.
    #[derive(Clone, Copy)]
    pub struct Flags;
}

/// Like in the kernel.
pub mod page {
    /// Like in the kernel.
    pub const PAGE_SIZE: usize = 4096;
}

/// Like in the kernel; the value is not used here.
macro_rules! pr_err {
    ($($args:tt)*) => {
        let _ = format_args!($($args)*);
    };
}

/// Like in the kernel.
pub mod prelude {
    use super::alloc::Flags;
    pub(crate) use pr_err;
    use std::{
        cell::Cell,
        ops::{
            Deref,
            DerefMut, //
        },
    };

    thread_local! {
        /// Mask of failing allocations. Bit 0 is the next one.
        static FAILURES: Cell<u32> = const { Cell::new(0) };
    }

    /// Makes those of the next 32 allocations fail that have their bit set in the mask.
    pub(crate) fn fail_allocations(which: u32) {
        FAILURES.set(which);
    }

    /// Returns whether the next allocation succeeds.
    pub(crate) fn allocate() -> Result {
        let failures = FAILURES.get();

        FAILURES.set(failures >> 1);
        match failures & 1 {
            0 => Ok(()),
            _ => Err(ENOMEM),
        }
    }

    /// An errno.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Error(i32);

    /// Like in the kernel.
    pub type Result<T = (), E = Error> = core::result::Result<T, E>;

    /// Like in the kernel.
    pub const EINVAL: Error = Error(22);
    /// Like in the kernel.
    pub const ENOMEM: Error = Error(12);

    /// Like in the kernel.
    pub const GFP_KERNEL_ACCOUNT: Flags = Flags;

    /// Like in the kernel.
    pub type KVVec<T> = Vec<T>;

    /// Like in the kernel.
    pub struct KBox<T>(Box<T>);

    impl<T> KBox<T> {
        /// Like in the kernel.
        ///
        /// # Errors
        ///
        /// `ENOMEM`.
        pub fn new(value: T, _flags: Flags) -> Result<Self> {
            allocate()?;
            Ok(Self(Box::new(value)))
        }
    }

    impl<T> Deref for KBox<T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.0
        }
    }

    impl<T> DerefMut for KBox<T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.0
        }
    }
}

/// Like in the kernel.
pub mod rbtree {
    use super::{
        alloc::Flags,
        prelude::*, //
    };
    use std::{
        collections::BTreeMap,
        ops::Bound, //
    };

    /// Like in the kernel.
    pub struct RBTree<K, V>(BTreeMap<K, V>);

    impl<K: Ord + Copy, V> RBTree<K, V> {
        /// Like in the kernel.
        #[allow(clippy::new_without_default)]
        pub fn new() -> Self {
            Self(BTreeMap::new())
        }

        /// Like in the kernel.
        pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
            self.0.get_mut(key)
        }

        /// Like in the kernel.
        ///
        /// # Errors
        ///
        /// `ENOMEM`.
        pub fn try_create_and_insert(
            &mut self,
            key: K,
            value: V,
            _flags: Flags,
        ) -> Result<Option<V>> {
            super::prelude::allocate()?;
            Ok(self.0.insert(key, value))
        }

        /// Like in the kernel.
        pub fn cursor_lower_bound_mut(&mut self, key: &K) -> Option<CursorMut<'_, K, V>> {
            let (key, _) = self.0.range(key..).next()?;
            let key = *key;

            Some(CursorMut { tree: self, key })
        }
    }

    /// Like in the kernel.
    pub struct CursorMut<'a, K, V> {
        tree: &'a mut RBTree<K, V>,
        key: K,
    }

    impl<K: Ord + Copy, V> CursorMut<'_, K, V> {
        /// Like in the kernel.
        pub fn current_mut(&mut self) -> (&K, &mut V) {
            let value = self.tree.0.get_mut(&self.key);

            (&self.key, value.expect("a cursor is on a node"))
        }

        /// Like in the kernel.
        pub fn current(&self) -> (&K, &V) {
            (&self.key, &self.tree.0[&self.key])
        }

        /// Like in the kernel: moves to the next node, or to the previous one.
        pub fn remove_current(self) -> (Option<Self>, V) {
            let value = self.tree.0.remove(&self.key);
            let next = self.tree.0.range(self.key..).next();
            let other = next.or(self.tree.0.range(..self.key).next_back());
            let key = other.map(|(key, _)| *key);
            let tree = self.tree;

            (
                key.map(|key| Self { tree, key }),
                value.expect("a cursor is on a node"),
            )
        }

        /// Like in the kernel.
        pub fn move_next(mut self) -> Option<Self> {
            let behind = (Bound::Excluded(self.key), Bound::Unbounded);

            self.key = *self.tree.0.range(behind).next()?.0;
            Some(self)
        }
    }
}

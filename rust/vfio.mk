# SPDX-License-Identifier: GPL-2.0
#
# Drivers that use the crate `vfio`, for a Kbuild in any folder:
#
#     include $(src)/../vfio/rust/vfio.mk
#     $(call vfio_driver,my_driver,main.o)
#
# A module consists of the crate of the driver and of the crate `vfio`, which has no
# module of its own, so that no symbols need exporting. Everything is built in $(obj).
# Only the tracepoints are compiled for each module, because they have its name.

vfio_rust := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))

# vfio_driver(MODULE,OBJECT...): the first object is the root of the driver's crate.
vfio_driver = $(eval $(call vfio_driver_rules,$(strip $(1)),$(2),$(obj)/$(firstword $(2))))
define vfio_driver_rules
obj-m += $(1).o
$(1)-y := $(2) vfio.o vfio_helpers.o $(1)_trace.o
$(3): private rustflags-y += --crate-name $(1) --extern vfio=$(obj)/libvfio.rmeta
$(3): $(obj)/vfio.o
CFLAGS_$(1)_trace.o := -DVFIO_TRACE_SYSTEM=$(1) -I$(vfio_rust)/helpers
$(obj)/$(1)_trace.o: $(vfio_rust)/helpers/vfio_trace.c FORCE
	$$(call if_changed_rule,cc_o_c)
endef

# Bindings of the headers that the kernel's own Rust bindings leave out, with
# the flags of rust/Makefile. Types that the kernel crate binds already are not
# emitted a second time.
vfio_bindgen_files := .*/((linux|uapi/linux)/(vfio|vfio_pci_core|mdev|anon_inodes)|helpers/vfio|vfio_bindings)\.h

ifdef CONFIG_CC_IS_CLANG
vfio_bindgen_c_flags = $(c_flags)
else
# Flags of GCC that libclang does not know, like bindgen_skip_c_flags in rust/Makefile.
vfio_bindgen_c_flags = $(filter-out -mno-fp-ret-in-387 -mpreferred-stack-boundary=% \
	-mskip-rax-setup -mgeneral-regs-only -mindirect-branch=% \
	-mindirect-branch-register -mfunction-return=% -mrecord-mcount \
	-mabi=lp64 -mindirect-branch-cs-prefix -mstack-protector-guard% \
	-fconserve-stack -falign-jumps=% -falign-loops=% \
	-femit-struct-debug-baseonly -fno-ipa-cp-clone -fno-ipa-sra \
	-fno-partial-inlining -fplugin-arg-arm_ssp_per_task_plugin-% \
	-fno-reorder-blocks -fno-allow-store-data-races -fasan-shadow-offset=% \
	-fzero-call-used-regs=% -fno-stack-clash-protection \
	-fno-inline-functions-called-once -fsanitize=bounds-strict \
	-fstrict-flex-arrays=% -fmin-function-alignment=% --param=% --param asan-% \
	-mno-sse4a -fno-guess-branch-probability -falign-functions=%,$(c_flags)) \
	-w --target=x86_64-linux-gnu
endif

quiet_cmd_vfio_bindgen = BINDGEN $@
      cmd_vfio_bindgen = $(BINDGEN) $< --no-recursive-allowlist \
	--allowlist-file '$(vfio_bindgen_files)' --blocklist-type eventfd_ctx \
	--rust-target 1.85 --use-core --with-derive-default \
	--with-derive-custom-struct '.*=MaybeZeroable' \
	--with-derive-custom-union '.*=MaybeZeroable' \
	--newtype-enum vfio_device_mig_state \
	--with-attribute-custom-enum=vfio_device_mig_state='\#[cfi_encoding="21vfio_device_mig_state"]' \
	--ctypes-prefix ffi --no-layout-tests --no-debug '.*' --no-doc-comments \
	--enable-function-attribute-detection -o $@ -- \
	$(filter-out $(CC_FLAGS_LTO),$(vfio_bindgen_c_flags)) \
	-fno-builtin -D__BINDGEN__ -DMODULE; \
	sed -Ei 's/pub const RUST_CONST_HELPER_([a-zA-Z0-9_]*)/pub const \1/g' $@

$(obj)/vfio_bindings_generated.rs: $(vfio_rust)/bindings/vfio_bindings.h FORCE
	$(call if_changed_dep,vfio_bindgen)
targets += vfio_bindings_generated.rs
clean-files += vfio_bindings_generated.rs libvfio.rmeta

$(obj)/vfio_helpers.o: $(vfio_rust)/helpers/vfio.c FORCE
	$(call if_changed_rule,cc_o_c)
	$(call cmd,force_checksrc)

# The crate `vfio`. The variable reaches include!(env!(..)) in rust/bindings.
$(obj)/vfio.o: export VFIO_BINDINGS = $(abspath $(obj))/vfio_bindings_generated.rs
$(obj)/vfio.o: private rustflags-y += --crate-name vfio --emit=metadata=$(obj)/libvfio.rmeta

# CONFIG_CFI checks the type of a callback and distinguishes an enum from its integer,
# see rust/bindgen_parameters. The last list of allowed features takes effect.
$(obj)/vfio.o: private rust_common_cmd += \
	-Zallow-features=$(rust_allowed_features),cfi_encoding -Zcrate-attr='feature(cfi_encoding)'

# By default, kbuild derives this name from all modules that the object is part of.
$(obj)/vfio.o: private modfile = $(obj)/vfio

$(obj)/vfio.o: $(vfio_rust)/vfio/lib.rs $(obj)/vfio_bindings_generated.rs FORCE
	+$(call if_changed_rule,rustc_o_rs)

#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Migrate a guest with a VFIO device from one QEMU to another, without hardware.

The QEMU under test boots a kernel with vfio_mock, a driver of migratable
devices that are made of software. The root file system of this machine is that
of the host, read only. In it, a guest migrates from one QEMU to another.

The archive with the kernel has no public address yet. QEMU_TEST_VFIO_SHA256 in
the environment is its checksum. QEMU_TEST_VFIO_URL is its address, unless it
is in the cache of assets.
"""

import os
import re
import sys
from pathlib import Path
from time import sleep
from unittest import skipUnless
from uuid import uuid4

from qemu.utils import kvm_available
from qemu_test import Asset, QemuSystemTest, wait_for_console_pattern

# A disk whose boot sector prints a dot at each tick of the timer:
# 1: sti; hlt; mov $0x3f8, %dx; mov $'.', %al; out %al, %dx; jmp 1b
DISK = (bytes.fromhex('fb f4 baf803 b02e ee ebf6').ljust(510, b'\0')
        + b'\x55\xaa').ljust(1 << 20, b'\0')
DOTS = '.' * 20
SHA256 = os.getenv('QEMU_TEST_VFIO_SHA256')


class Nested(QemuSystemTest):
    """Runs in the machine that VfioMigration boots."""

    def start(self, name, *args):
        """Start a QEMU with a device of its own."""
        device = str(uuid4())
        types = Path('/sys/class/mdev_bus/vfio_mock/mdev_supported_types')
        (types / 'vfio_mock-1M' / 'create').write_text(device, 'utf-8')
        vm = self.get_vm(
            '-nodefaults', '-accel', 'tcg', '-m', '64', '-drive',
            f'file={self.scratch_file("disk")},format=raw', '-device',
            f'vfio-pci,sysfsdev=/sys/bus/mdev/devices/{device}'
            ',enable-migration=on', *args, name=name)
        vm.set_console()
        vm.launch()
        return vm, Path('/sys/kernel/debug/vfio', device)

    def migrate(self):
        """The guest goes on, and QEMU breaks no unexpected rule of VFIO."""
        self.set_machine('q35')
        Path(self.scratch_file('disk')).write_bytes(DISK)
        uri = 'unix:/run/migration'
        source, source_device = self.start('source')
        target, target_device = self.start('target', '-incoming', uri)

        wait_for_console_pattern(self, DOTS, vm=source)
        source.cmd('migrate', uri=uri)
        while source.cmd('query-migrate')['status'] != 'completed':
            self.assertNotEqual(source.cmd('query-migrate')['status'], 'failed')
            sleep(0.5)
        wait_for_console_pattern(self, DOTS, vm=target)
        self.assertEqual(target.cmd('query-status')['status'], 'running')
        source.shutdown()
        target.shutdown()

        # QEMU leaves the log of DMA on the source enabled until it ends.
        self.assertRegex((source_device / 'verdict').read_text('utf-8'),
                         r'\A(clean|log_not_stopped:.*)\n(advice:.*\n)*\Z')
        self.assertRegex((target_device / 'verdict').read_text('utf-8'),
                         r'\Aclean\n')
        # All of its 1 MiB has arrived.
        self.assertRegex((target_device / 'statistics').read_text('utf-8'),
                         r'\nwritten_bytes \d{7,}\n')


class VfioMigration(QemuSystemTest):
    """Boots a machine with migratable devices, and runs Nested in it."""

    if SHA256:
        ASSET_BUNDLE = Asset(os.getenv('QEMU_TEST_VFIO_URL', ''), SHA256)

    @skipUnless(SHA256, 'QEMU_TEST_VFIO_SHA256 is not set')
    def test_vfio_mock(self):
        """A guest with a device of vfio_mock migrates."""
        self.set_machine('q35')
        self.require_device('vfio-pci')
        self.require_device('virtio-9p-pci')
        self.archive_extract(self.ASSET_BUNDLE, format='tar')
        log = Path(self.log_file())
        work = Path(self.scratch_file())
        bundle = work / 'vfio-bundle'

        # For the init of the archive: modules, command, and writable folders.
        load = (bundle / 'boot' / 'load').read_text('utf-8')
        load = load.replace('modules/', f'{bundle}/modules/')
        command = [os.getcwd(), 'env', 'PYTHONPATH=' + ':'.join(sys.path),
                   f'QEMU_TEST_QEMU_BINARY={self.qemu_bin}',
                   f'QEMU_BUILD_ROOT={self.build_file()}', sys.executable,
                   '-m', 'unittest', f'{__name__}.Nested.migrate', '']
        (work / 'load').write_text(load, 'utf-8')
        (work / 'command').write_text('\0'.join(command), 'utf-8')
        (work / 'share').touch()

        # /dev/kvm may exist on a machine without virtualization.
        cpu = Path('/proc/cpuinfo').read_text('utf-8')
        kvm = (kvm_available(qemu_bin=self.qemu_bin)
               and re.search(r'\b(svm|vmx)\b', cpu))
        self.vm.add_args(
            '-accel', 'kvm' if kvm else 'tcg', '-cpu', 'max', '-smp', '2',
            '-m', '2G', '-no-reboot', '-kernel', f'{bundle}/boot/bzImage',
            '-initrd', f'{bundle}/boot/initramfs', '-append',
            # The emulated timer may be late on a busy machine.
            'no_timer_check tsc=reliable console=ttyS0 kunit.enable=0 '
            'oops=panic panic_on_warn=1 panic=-1 '
            f'vfio_work={work} vfio_bundle={bundle}',
            '-serial', f'file:{log}/kernel.log', '-virtfs',
            'local,path=/,mount_tag=root,security_model=none,readonly=on,'
            'multidevs=remap', '-device', 'virtio-serial')
        for name in ('out', 'err', 'status'):
            self.vm.add_args(
                '-chardev', f'file,id={name},path={log}/{name}', '-device',
                f'virtserialport,name=vfio.{name},chardev={name}')
        self.vm.launch()
        self.vm.wait(timeout=600)
        self.assertEqual((log / 'status').read_text('utf-8'), '0\n',
                         (log / 'err').read_text('utf-8'))


if __name__ == '__main__':
    QemuSystemTest.main()

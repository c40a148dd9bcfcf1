#!/bin/bash
# The first process of ./dev vm's virtual machine: a host as a server with systemd shows itself to
# Godwit (cgroup v2 alone, controllers on at the root, everybody in a cgroup of their own), then
# the commands that came with it in run.sh. Its exit code goes out through the port "result".
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb

# How long console and port may take to appear, in tenths of a second.
READY_TENTHS=100

# Debian 12's kernel has them as modules; until they are there the console is the serial line.
find_outside() {
    modprobe -a virtio_pci virtio_console
    for ((n = 0; n < READY_TENTHS; n++)); do
        port=$(grep -lx result /sys/class/virtio-ports/*/name 2>/dev/null)
        if [ -n "$port" ] && [ -c /dev/hvc0 ]; then
            exec >/dev/hvc0 2>&1
            return
        fi
        sleep 0.1
    done
    echo "vm: no way out of the virtual machine: its virtio console or port does not appear"
}

prepare() {
    set -e
    mount -t proc -o nosuid,nodev,noexec proc /proc
    mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
    mkdir -p /dev/pts /dev/shm
    mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
    mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
    mount -t tmpfs -o nosuid,nodev tmpfs /tmp
    mkdir -p /run/lock
    [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
    # systemd shares every mount with the namespaces made later; so do users' servers.
    mount --make-rshared /
    # With systemd's options and its habit of leaving no process at the root.
    mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
    mkdir /sys/fs/cgroup/init.scope
    echo $$ >/sys/fs/cgroup/init.scope/cgroup.procs
    echo '+cpu +memory +pids +io' >/sys/fs/cgroup/cgroup.subtree_control
    echo 0 >/proc/sys/fs/pipe-user-pages-soft
    echo 1 >/proc/sys/vm/unprivileged_userfaultfd
    hostname vm
    ip link set lo up
    # CRIU asks for socket diagnosis before anything has loaded it; the rest the kernel loads when used.
    modprobe -a overlay veth bridge vxlan tun nf_tables \
        unix_diag inet_diag tcp_diag udp_diag af_packet_diag netlink_diag
}

(prepare)
prepared=$?
find_outside
if [ $prepared = 0 ]; then
    setsid -w bash /godwit-vm/run.sh </dev/null
    code=$?
else
    echo "vm: cannot prepare the virtual machine (the message is above)"
    code=125
fi
echo "$code" >"/dev/$(basename "$(dirname "$port")")"
sync
busybox poweroff -f
while :; do sleep 1; done

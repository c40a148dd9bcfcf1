//! Root inside a container tries to reach what is not its own.

use crate::world::{World, text};

const TWO: &str = r#"
name: NAME
services:
  a:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "mkdir /w; echo NAME-secret >/w/index.html; httpd -p 80 -h /w; exec sleep 98765"]
    deploy: {replicas: 2}
"#;

#[test]
fn root_in_a_container_reaches_nothing_else() {
    let Some(world) = World::up("isol", 1, &[]) else { return };
    for name in ["one", "two"] {
        world.apply(&TWO.replace("NAME", name));
        world.wait_running(&format!("{name}/a-1"));
        world.wait_running(&format!("{name}/a-2"));
    }
    let neighbour = world.container("one/a-2").unwrap();
    let neighbour_pid = neighbour["status"]["pid"].as_u64().unwrap().to_string();
    let neighbour_address = neighbour["address"].as_str().unwrap().to_owned();
    let other_address = world.container("two/a-1").unwrap()["address"].as_str().unwrap().to_owned();
    let host_address = world.host_address(1).to_string();
    let own = "one/a-1";
    let inside = |script: &str| world.godwit(&["exec", own, "--", "sh", "-c", script]).output().unwrap();

    // It is root, and its own environment answers: what fails below fails for the right reason.
    assert_eq!(world.ok(&["exec", own, "--", "id", "-u"]).trim(), "0");
    let out = inside(&format!("timeout 3 wget -qO- http://{neighbour_address}/"));
    assert!(text(&out).contains("one-secret"), "{}", text(&out));

    for (what, script) in [
        ("signal another container's process", format!("kill -9 {neighbour_pid}")),
        ("see another container's processes", "ps | grep -v grep | grep -c 'sleep 98765' | grep -qx 2".to_owned()),
        ("mount a tmpfs", "mount -t tmpfs x /mnt".to_owned()),
        ("mount proc", "mkdir -p /p; mount -t proc x /p".to_owned()),
        ("mount a cgroup hierarchy", "mkdir -p /c; mount -t cgroup -o memory x /c || mount -t cgroup2 x /c".to_owned()),
        ("remount /proc/sys writable", "mount -o remount,rw /proc/sys".to_owned()),
        ("make a device", "mknod /tmp/sda b 8 0 || mknod /dev/mem2 c 1 1".to_owned()),
        ("write a sysctl of the host", "echo 1 >/proc/sys/kernel/sysrq || echo x >/proc/sys/kernel/core_pattern".to_owned()),
        ("trigger sysrq", "echo h >/proc/sysrq-trigger".to_owned()),
        ("set a release agent", "for f in $(find /sys/fs/cgroup -name release_agent 2>/dev/null); do echo /x >$f && exit 0; done; exit 1".to_owned()),
        ("raise its own limits", "for f in $(find /sys/fs/cgroup -name memory.limit_in_bytes -o -name memory.max -o -name pids.max 2>/dev/null); do echo 999999999 >$f && exit 0; done; exit 1".to_owned()),
        ("read the kernel's memory", "cat /proc/kcore /dev/mem /dev/kmsg 2>/dev/null | head -c 1 | wc -c | grep -qx 1".to_owned()),
        ("read the host's files", "ls /proc/1/root/var/lib/godwit || ls /var/lib/godwit || cat /etc/shadow.host".to_owned()),
        ("leave by /proc", "cat /proc/*/root/var/lib/godwit/agent/ledger.json".to_owned()),
        ("change its address", "ip addr add 10.64.0.250/20 dev eth0 || ip link set eth0 address 02:00:00:00:00:99".to_owned()),
        ("load a module", "insmod /x.ko || modprobe dummy".to_owned()),
        ("set the clock", "date -s 2001-01-01 >/dev/null && date +%Y | grep -qx 2001".to_owned()),
        ("set the host name of others", "hostname other && hostname | grep -qx other".to_owned()),
        ("make a user namespace with more rights", "unshare -U -m true".to_owned()),
        ("reach another environment", format!("timeout 3 wget -qO- http://{other_address}/ | grep secret")),
        ("reach the agent of its host", format!("nc -w 2 {host_address} 7718 </dev/null")),
        ("reach the controller", "nc -w 2 192.168.77.2 7717 </dev/null".to_owned()),
    ] {
        let out = inside(&script);
        assert!(!out.status.success(), "it could {what}: {script}\n{}", text(&out));
        // Not because the tool is missing.
        let said = text(&out);
        assert!(!said.contains("applet not found") && !said.contains(": not found"), "{what}: {said}");
    }
    assert_eq!(world.container("one/a-2").unwrap()["status"]["pid"].as_u64().unwrap().to_string(), neighbour_pid);
    world.down();
}

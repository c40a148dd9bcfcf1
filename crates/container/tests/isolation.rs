//! From root inside a container: everything that must not work, tried.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{World, root_or_skip};
use nix::libc;

/// Set inside the container, where this very test program tries the system calls.
const INSIDE: &str = "GODWIT_TEST_INSIDE";

#[test]
fn a_shell_as_root_inside_reaches_nothing_outside() {
    if !root_or_skip() {
        return;
    }
    // A process of the host's that must neither be seen nor hit.
    let mut bystander = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = bystander.id();
    let secret = Path::new("/var/tmp").join(format!("godwit-secret-{}", std::process::id()));
    std::fs::write(&secret, "secret").unwrap();
    let refused = [
        "mount -t tmpfs none /tmp".into(),
        "mount -t proc proc /tmp".into(),
        "mount -o remount,rw /sys".into(),
        "umount /proc/kcore".into(),
        "umount /dev".into(),
        "mknod /tmp/disk b 254 0".into(),
        "mknod /dev/mem c 1 1".into(),
        "echo 1 > /proc/sys/kernel/panic".into(),
        "echo core > /proc/sys/kernel/core_pattern".into(),
        "echo h > /proc/sysrq-trigger".into(),
        "echo 1 > /proc/irq/default_smp_affinity".into(),
        "unshare -U true".into(),
        "unshare -m true".into(),
        "unshare -n true".into(),
        "hostname other".into(),
        "ip link add d0 type dummy".into(),
        "arping -c 1 -I lo 127.0.0.1".into(),
        "test -s /proc/kcore".into(),
        "test -n \"$(ls -A /sys/firmware)\"".into(),
        "test -d /sys/fs/cgroup/memory".into(),
        "echo x > /sys/kernel/uevent_helper".into(),
        "find / -xdev -name release_agent | grep -q .".into(),
        "chroot /proc/1/root test -e /var/tmp".into(),
        "swapon /bin/busybox".into(),
        "dmesg".into(),
        "test -e /dev/vda".into(),
        "test -e /dev/fuse".into(),
        format!("kill -0 {pid}"),
        format!("test -d /proc/{pid} -a {pid} -gt 1000"),
        format!("test -e {}", secret.display()),
        format!("test -e /proc/1/root{}", secret.display()),
        format!("test -e /../../../..{}", secret.display()),
    ];
    let mut script = String::new();
    for attempt in &refused {
        script += &format!("if ( {attempt} ) >/dev/null 2>&1; then echo 'WORKED: {}'; fi\n", attempt.replace('\'', ""));
    }
    script += "echo processes: $(ls /proc | grep -c '^[0-9]')\n\
        cat /proc/self/uid_map /proc/self/gid_map; \
        grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status; \
        cat /proc/self/mountinfo; ls -l /dev;\
        echo x > /dev/null && head -c 4 /dev/urandom | wc -c; cat /proc/net/dev | grep -c :; ls -l /proc/self/fd; \
        touch /tmp/mine; cat /proc/sys/net/mptcp/enabled /proc/sys/net/ipv4/ping_group_range /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /proc/1/cgroup";
    let world = World::new("isolation", &script);
    let (exit, log) = world.run_to_end();
    let host_sees = std::fs::metadata(world.rootfs.upper().join("tmp/mine")).unwrap();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    std::fs::remove_file(&secret).unwrap();
    assert_eq!(exit.code, Some(0), "{log}");
    assert!(!log.contains("WORKED"), "{log}");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&host_sees), 200_000, "root inside is nobody outside");

    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT SETFCAP.
    let kept = "00000000800405fb";
    for want in [
        format!("CapEff:\t{kept}"),
        format!("CapPrm:\t{kept}"),
        format!("CapBnd:\t{kept}"),
        "CapInh:\t0000000000000000".into(),
        "CapAmb:\t0000000000000000".into(),
        "NoNewPrivs:\t1".into(),
        "Seccomp:\t2".into(),
    ] {
        assert!(log.contains(&want), "{want} in {log}");
    }
    let maps = log.lines().filter(|line| line.split_whitespace().eq(["0", "200000", "65536"])).count();
    assert_eq!(maps, 2, "{log}");
    for line in log.lines().filter(|line| line.contains(" - ")) {
        assert!(!line.contains(" cgroup") && !line.contains("mqueue"), "{line}");
        assert!(!line.contains("shared:") && !line.contains("master:"), "propagation: {line}");
    }
    let root = log.lines().find(|line| line.contains(" / / ")).expect("a root mount");
    assert!(root.contains("nodev"), "{root}");
    world.finish();
}

#[test]
fn another_user_inside_has_no_capabilities() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new(
        "nobody",
        "grep -E 'Cap|Uid' /proc/self/status; echo x > /bin/x || echo refused; echo hi > /dev/stdout",
    );
    world.spec.user = godwit_container::spec::User { uid: 65534, gid: 65534, groups: vec![] };
    let (_, log) = world.run_to_end();
    assert!(log.contains("CapEff:\t0000000000000000") && log.contains("CapPrm:\t0000000000000000"), "{log}");
    assert!(log.contains("Uid:\t65534\t65534\t65534\t65534"), "{log}");
    // The shell's own complaint takes another pipe, and may stand anywhere.
    assert!(log.contains("refused\n") && log.contains("hi\n"), "{log}");
    world.finish();
}

/// The calls, run inside and printed as `name: errno`.
#[test]
#[ignore = "runs inside a container, started by system_calls_answer_as_the_table_says"]
fn try_system_calls() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let show = |name: &str, result: i64| {
        let errno = if result == -1 { nix::errno::Errno::last_raw() } else { 0 };
        println!("{name}: {errno}");
    };
    let mut page = [0u8; 4096];
    let page = page.as_mut_ptr();
    let calls: [(&str, i64, [i64; 3]); 37] = [
        ("io_uring_setup", libc::SYS_io_uring_setup, [8, page as i64, 0]),
        ("io_uring_enter", libc::SYS_io_uring_enter, [-1, 0, 0]),
        ("io_uring_register", libc::SYS_io_uring_register, [-1, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, page as i64, 64]),
        ("perf_event_open", libc::SYS_perf_event_open, [page as i64, 0, -1]),
        ("add_key", libc::SYS_add_key, [page as i64, page as i64, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -3, 0]),
        ("setns", libc::SYS_setns, [0, 0, 0]),
        ("unshare user", libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0]),
        ("unshare files", libc::SYS_unshare, [i64::from(libc::CLONE_FILES), 0, 0]),
        ("clone user", libc::SYS_clone, [i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0]),
        ("clone3", libc::SYS_clone3, [page as i64, 64, 0]),
        ("mount", libc::SYS_mount, [c"none".as_ptr() as i64, c"/tmp".as_ptr() as i64, c"tmpfs".as_ptr() as i64]),
        ("fsopen", libc::SYS_fsopen, [c"tmpfs".as_ptr() as i64, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [-100, c"/".as_ptr() as i64, 1]),
        ("mq_open", libc::SYS_mq_open, [c"q".as_ptr() as i64, 66, 0o600]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [-100, page as i64, 0]),
        ("init_module", libc::SYS_init_module, [page as i64, 0, page as i64]),
        ("kexec_load", libc::SYS_kexec_load, [0, 0, page as i64]),
        ("reboot", libc::SYS_reboot, [0, 0, 0]),
        ("socket vsock", libc::SYS_socket, [40, 1, 0]),
        ("socket alg", libc::SYS_socket, [38, 5, 0]),
        ("socket packet", libc::SYS_socket, [17, 3, 0]),
        ("socket raw", libc::SYS_socket, [2, 3, 1]),
        ("socket ping", libc::SYS_socket, [2, 2, 1]),
        ("socket mptcp", libc::SYS_socket, [2, 1, 262]),
        ("socket sctp", libc::SYS_socket, [2, 1, 132]),
        ("socket seqpacket", libc::SYS_socket, [2, 5, 0]),
        ("socket tcp", libc::SYS_socket, [2, 1, 0]),
        ("kernel tls", libc::SYS_setsockopt, [-1, 6, 31]),
        ("tcp md5", libc::SYS_setsockopt, [-1, 6, 14]),
        ("setsockopt", libc::SYS_setsockopt, [-1, 6, 1]),
        ("mdwe", libc::SYS_prctl, [65, 1, 0]),
        ("prctl", libc::SYS_prctl, [3, 0, 0]),
        ("personality", libc::SYS_personality, [0x0040000, 0, 0]),
        ("clock_settime", libc::SYS_clock_settime, [0, page as i64, 0]),
    ];
    for (name, number, [a, b, c]) in calls {
        // SAFETY: pointers are to static strings or to a live page; a call that is not refused
        // fails on these arguments or makes something that ends with this process.
        let result = unsafe { libc::syscall(number, a, b, c, 0, 0, 0) };
        show(name, result);
    }
}

#[test]
fn system_calls_answer_as_the_table_says() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new("syscalls", "");
    // This test program and the libraries it is linked to go into the container.
    let here = std::env::current_exe().unwrap();
    let root = world.rootfs.path();
    let libraries = std::process::Command::new("ldd").arg(&here).output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    let found = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for library in found.map(Path::new) {
        let inside = root.join(library.strip_prefix("/").unwrap());
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::copy(library, inside).unwrap();
    }
    std::fs::copy(&here, root.join("probe")).unwrap();
    world.spec.argv = ["/probe", "--exact", "try_system_calls", "--ignored", "--nocapture", "--test-threads=1"]
        .map(String::from)
        .to_vec();
    world.spec.env.push(format!("{INSIDE}=1"));
    let (exit, log) = world.run_to_end();
    assert_eq!(exit.code, Some(0), "{log}");
    let (enosys, eperm) = (libc::ENOSYS, libc::EPERM);
    for (name, errno) in [
        ("io_uring_setup", enosys),
        ("io_uring_enter", enosys),
        ("io_uring_register", enosys),
        ("clone3", enosys),
        ("mq_open", enosys),
        ("userfaultfd", eperm),
        ("bpf", eperm),
        ("perf_event_open", eperm),
        ("add_key", eperm),
        ("keyctl", eperm),
        ("setns", eperm),
        ("unshare user", eperm),
        ("unshare files", 0),
        ("clone user", eperm),
        ("mount", eperm),
        ("fsopen", eperm),
        ("open_tree", eperm),
        ("open_by_handle_at", eperm),
        ("init_module", eperm),
        ("kexec_load", eperm),
        ("reboot", eperm),
        ("clock_settime", eperm),
        ("socket raw", eperm),
        ("socket seqpacket", libc::ESOCKTNOSUPPORT),
        ("socket tcp", 0),
        ("kernel tls", libc::ENOENT),
        ("tcp md5", libc::ENOPROTOOPT),
        ("setsockopt", libc::EBADF),
        ("mdwe", libc::EINVAL),
        ("prctl", 0),
        ("socket ping", 0),
        ("personality", eperm),
        ("socket vsock", libc::EAFNOSUPPORT),
        ("socket alg", libc::EAFNOSUPPORT),
        ("socket packet", libc::EAFNOSUPPORT),
        ("socket mptcp", libc::EPROTONOSUPPORT),
        ("socket sctp", libc::EPROTONOSUPPORT),
    ] {
        assert!(log.lines().any(|line| line.ends_with(&format!("{name}: {errno}"))), "{name}: {errno} in {log}");
    }
    world.finish();
}

//! What the kernel lets a program do and CRIU cannot carry: told before a move, and refused (docs/movable.md).

use crate::world::World;

/// One container for each: it does what its name says and stays like that. System calls by their numbers on x86-64.
const HOLDERS: &str = r#"
name: m
x-perl: &perl
  image: oci:${IMAGES}/redis:latest
services:
  packets:
    <<: *perl
    command: [perl, -e, 'use Fcntl; pipe($$r, $$w); fcntl($$w, F_SETFL, O_DIRECT | O_WRONLY); sleep 1000']
  traced:
    <<: *perl
    command: [perl, -e, 'if (fork == 0) { syscall(101, 0, 0, 0, 0); sleep 1000 } sleep 1000']
  headless:
    <<: *perl
    command: [perl, -e, 'use threads; if (fork == 0) { threads->create(sub { sleep 1000 }); syscall(60, 0) } sleep 1000']
  corked:
    <<: *perl
    command: [perl, -e, 'use Socket; socket(S, PF_INET, SOCK_DGRAM, 17); connect(S, sockaddr_in(9, inet_aton("127.0.0.1"))); setsockopt(S, 17, 1, 1); send(S, "x", 0); sleep 1000']
  unread:
    <<: *perl
    command: [perl, -e, 'use Socket; socket(S, 16, SOCK_RAW, 0); send(S, pack("LSSLLL", 20, 18, 0x301, 1, 0, 0), 0); sleep 1000']
  watcher:
    <<: *perl
    user: root
    command: [perl, -e, 'use Fcntl; $$i = syscall(294, 0); open(F, "<&=", $$i); for ("/etc", "/etc/passwd", "/data", "/dev/shm") { my $$d = "$$_"; syscall(254, $$i, $$d, 0x2 | 0x100) >= 0 or die $$d } print "watching\n"; $$| = 1; while (sysread(F, $$e, 4096)) { print "seen\n" }']
    volumes: ["files:/data"]
volumes: {files: {}}
"#;

#[test]
fn what_processes_do_that_cannot_be_carried_is_told_and_refused() {
    let Some(world) = World::up("held", 2, &[]) else { return };
    world.apply(HOLDERS);
    for (name, told) in [
        ("m/packets-1", "packet mode"),
        ("m/traced-1", "is traced by perl"),
        ("m/headless-1", "first one has ended"),
        ("m/corked-1", "UDP_CORK"),
        ("m/unread-1", "messages that nobody reads"),
    ] {
        let seen = world.wait(name, "known not to be movable", |c| {
            c["status"]["movable"]["because"].as_array().is_some_and(|because| !because.is_empty())
        });
        let because = seen["status"]["movable"]["because"].to_string();
        assert!(because.contains(told), "{name}: {because}");
        let to = if seen["host"] == "h1" { "h2" } else { "h1" };
        let said = world.refused(1, &["migrate", name, "--to", to]);
        assert!(said.contains(told), "{name}: {said}");
        let explained = world.ok(&["explain", name]);
        assert!(explained.contains("no, because ") && explained.contains("container-placed"), "{explained}");
        assert!(explained.contains("written pages  told by the kernel"), "{explained}");
        assert_ne!(world.json(&["explain", name])["placed"]["message"], serde_json::Value::Null);
    }
    assert_eq!(world.json(&["move", "list"]), serde_json::json!([]));
    world.down();
}

/// Watches of files in the image, in what the container wrote, in a volume and on a tmpfs go on at the other host.
#[test]
fn watched_files_are_watched_after_a_move() {
    let Some(world) = World::up("watched", 2, &[]) else { return };
    world.apply(HOLDERS);
    let seen = world.wait_running("m/watcher-1");
    let lines = || world.ok(&["logs", "m/watcher-1"]).lines().filter(|line| *line == "seen").count();
    let poke = |file: &str| {
        let before = lines();
        world.ok(&["exec", "m/watcher-1", "--", "touch", file]);
        world.ok(&["exec", "m/watcher-1", "--", "sh", "-c", &format!("echo x >> {file}")]);
        let told = world.until(std::time::Duration::from_secs(10), || (lines() > before).then_some(()));
        assert!(told.is_some(), "{file} is not watched: {}", world.ok(&["logs", "m/watcher-1"]));
    };
    let files = ["/etc/new", "/etc/passwd", "/data/new", "/dev/shm/new"];
    files.iter().for_each(|file| poke(file));
    let to = if seen["host"] == "h1" { "h2" } else { "h1" };
    let done = world.migrate("m/watcher-1", to);
    assert_eq!(done["outcome"]["state"], "done", "{done:#}");
    files.iter().for_each(|file| poke(file));
    world.down();
}

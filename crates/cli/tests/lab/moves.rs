//! Live migration of programs that check themselves and of programs that people run.

use std::time::Duration;

use godwit_lab::Node;
use serde_json::Value;

use crate::world::World;

pub const WORKLOAD: &str = r#"
name: t
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "32"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
volumes: {files: {}}
"#;

/// What the workload says of itself.
pub fn status(world: &World) -> Value {
    let address = format!("{}:7000", world.host_address(1));
    let output = world.on_client(&[crate::world::GODWIT, "workload", "status", "--address", &address]);
    assert!(output.status.success(), "{}\n{}", crate::world::text(&output), world.logs());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Waits until the workload answers: a container runs before its program listens.
pub fn wait_listening(world: &World, address: &str) {
    let argv = [crate::world::GODWIT, "workload", "status", "--address", address];
    let answers = world.until(Duration::from_secs(30), || world.on_client(&argv).status.success().then_some(()));
    assert!(answers.is_some(), "{}", world.logs());
}

fn next_host(host: &str) -> &'static str {
    match host {
        "h1" => "h2",
        "h2" => "h3",
        _ => "h1",
    }
}

/// Memory, files on a volume, pipes, timers, a child and both directions of many streams, twenty moves in a row.
#[test]
fn twenty_moves_in_a_row_lose_nothing() {
    let Some(world) = World::up("twenty", 3, &["--link", "10gbit"]) else { return };
    world.apply(WORKLOAD);
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "8", "--until-stdin-closes"]);
    let before = status(&world);
    let mut host = world.host_of("t/w-1");
    let mut downtimes = Vec::new();
    for _ in 0..20 {
        let to = next_host(&host);
        let done = world.migrate("t/w-1", to);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        downtimes.push(done["summary"]["downtime_ms"].as_f64().unwrap());
        host = to.to_owned();
        assert_eq!(world.host_of("t/w-1"), host);
    }
    let after = status(&world);
    assert_eq!(after["ok"], true, "{after:#}");
    for same in ["instance", "pid", "started_unix_ms"] {
        assert_eq!(after[same], before[same], "{same}");
    }
    assert_eq!(after["streams_broken"], 0, "{after:#}");
    let report = client.finish();
    downtimes.sort_by(f64::total_cmp);
    println!(
        "downtime ms: median {:.0}, {:.0} to {:.0}; longest client gap {:.0}",
        downtimes[10],
        downtimes[0],
        downtimes[19],
        report["client_gap_ms"].as_f64().unwrap()
    );
    // One container, on one host, and nothing of it on the others.
    for number in 1..=3 {
        let containers = world.lab.paths().host_state(Node::Host(number)).join("agent/containers");
        let count = std::fs::read_dir(containers).unwrap().count();
        assert_eq!(count, usize::from(host == format!("h{number}")), "h{number}");
    }
    world.down();
}

const OTHERS: &str = r#"
name: x
services:
  a:
    image: oci:${IMAGES}/busybox:latest
    command: [sleep, "100000"]
    deploy: {replicas: 3}
    ports: ["9000:9000"]
"#;

/// Every change of anything makes the agents carry out what is wanted anew, and a move's requests overtake that. What an
/// older word does not know of must not be undone by it.
#[test]
fn moves_go_well_while_everything_else_changes() {
    let Some(world) = World::up("churn", 3, &["--link", "10gbit"]) else { return };
    // Before the workload's manifest, which is kept in the same file.
    let others = world.manifest(OTHERS).with_file_name("others.yaml");
    std::fs::rename(world.manifest(OTHERS), &others).unwrap();
    world.apply(WORKLOAD);
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "8", "--until-stdin-closes"]);
    let before = status(&world);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            let mut changes = 0;
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                world.ok(&["env", "apply", "-f", others.to_str().unwrap()]);
                world.ok(&["env", "delete", "x", "--yes"]);
                changes += 2;
            }
            changes
        });
        // Whatever happens here, the other thread ends.
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..20 {
                let to = next_host(&world.host_of("t/w-1"));
                let done = world.migrate("t/w-1", to);
                assert_eq!(done["outcome"]["state"], "done", "{done:#}");
            }
        }));
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        let changes = churn.join().unwrap();
        if let Err(panic) = moved {
            std::panic::resume_unwind(panic);
        }
        println!("20 moves amid {changes} changes");
        assert!(changes > 20, "{changes}");
    });
    let after = status(&world);
    assert_eq!((&after["ok"], &after["instance"]), (&Value::Bool(true), &before["instance"]), "{after:#}");
    assert_eq!(after["streams_broken"], 0, "{after:#}");
    client.finish();
    world.down();
}

const PROGRAMS: &str = r#"
name: p
services:
  cache:
    image: oci:${IMAGES}/redis:latest
    command: redis-server --save ''
    ports: ["6379:6379"]
    healthcheck: {test: [CMD, redis-cli, ping], interval: 2s}
  db:
    image: oci:${IMAGES}/postgresql:latest
    environment: {POSTGRES_DB: shop, POSTGRES_PASSWORD: "", POSTGRES_HOST_AUTH_METHOD: trust}
    volumes: ["db-files:/var/lib/postgresql/data"]
    ports: ["5432:5432"]
    stop_signal: SIGINT
    healthcheck: {test: [CMD, pg_isready, --quiet, --host=127.0.0.1], interval: 2s, start_period: 60s}
  web:
    image: oci:${IMAGES}/nginx:latest
    ports: ["8080:80"]
volumes: {db-files: {}}
"#;

/// Moves a container to h1, then h2, h3, h1.
fn around(world: &World, name: &str) -> Vec<Value> {
    let mut moves = Vec::new();
    let at = world.host_of(name);
    for to in ["h1", "h2", "h3", "h1"] {
        if moves.is_empty() && at == to {
            continue;
        }
        moves.push(world.migrate(name, to));
    }
    moves
}

#[test]
fn redis_keeps_its_data_and_its_connection() {
    let Some(world) = World::up("redis", 3, &["--link", "10gbit"]) else { return };
    world.apply(&PROGRAMS.replace("  db:", "  db:\n    deploy: {replicas: 0}"));
    world.wait_healthy("p/cache-1");
    let address = format!("{}:6379", world.host_address(2));
    let workload = |verb| {
        let output = world.on_client(&[crate::world::GODWIT, "workload", verb, "--address", &address, "--mib", "64"]);
        assert!(output.status.success(), "{}", crate::world::text(&output));
    };
    workload("redis-fill");
    let client = world.client(&["redis-client", "--address", &address, "--until-stdin-closes"]);
    let run_id = |world: &World| world.ok(&["exec", "p/cache-1", "--", "redis-cli", "info", "server"]);
    let run_id = |world: &World| run_id(world).lines().find(|l| l.starts_with("run_id")).unwrap().to_owned();
    let before = run_id(&world);
    let moves = around(&world, "p/cache-1");
    assert!(moves.len() >= 3);
    assert_eq!(world.container("p/cache-1").unwrap()["health"], "healthy", "it is no newcomer where it arrived");
    assert_eq!(run_id(&world), before, "the same process");
    client.finish();
    workload("redis-check");
    world.down();
}

#[test]
fn postgresql_fails_no_transaction() {
    let Some(world) = World::up("pg", 3, &["--link", "10gbit"]) else { return };
    world.apply(PROGRAMS);
    world.wait_healthy("p/db-1");
    let host = world.host_address(3).to_string();
    let pgbench = std::fs::read_dir("/usr/lib/postgresql").unwrap().flatten().map(|e| e.path().join("bin/pgbench"));
    let pgbench = pgbench.filter(|p| p.exists()).max().unwrap().to_str().unwrap().to_owned();
    let common = ["-h", &host, "-U", "postgres", "shop"];
    let init = world.on_client(&[&[pgbench.as_str(), "-i", "-q", "-s", "2"], &common[..]].concat());
    assert!(init.status.success(), "{}", crate::world::text(&init));
    let bench = [&[pgbench.as_str(), "-c", "4", "-T", "3600", "-P", "1"], &common[..]].concat();
    let mut command = world.lab.exec(Node::Client, &bench).unwrap();
    let mut bench = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let ask = |world: &World, query: &str| {
        let psql = ["timeout", "60", "psql"];
        let output = world.on_client(&[&psql, &common[..2], &["-U", "postgres", "-tAc", query, "shop"]].concat());
        assert!(output.status.success(), "{query}: {}\n{}", crate::world::text(&output), world.logs());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let started = |world: &World| ask(world, "select pg_postmaster_start_time()");
    let before = started(&world);
    around(&world, "p/db-1");
    assert_eq!(started(&world), before, "the same process");
    // A first interrupt makes pgbench report and end.
    rustix::process::kill_process(rustix::process::Pid::from_child(&bench), rustix::process::Signal::INT).unwrap();
    let ended = world.until(Duration::from_secs(20), || bench.try_wait().unwrap());
    let _ = bench.kill();
    let output = bench.wait_with_output().unwrap();
    assert!(ended.is_some());
    let said = crate::world::text(&output);
    assert!(!said.contains("error") && !said.contains("aborted") && !said.contains("failed: "), "{said}");
    assert!(said.lines().filter(|l| l.starts_with("progress: ")).count() >= 3, "{said}");
    let count =
        ask(&world, "select (select sum(delta) from pgbench_history) = (select sum(abalance) from pgbench_accounts)");
    assert_eq!(count, "t", "every transaction is there once");
    world.down();
}

#[test]
fn nginx_goes_on_sending_a_file() {
    let Some(world) = World::up("nginx", 3, &["--link", "10gbit"]) else { return };
    world.apply(&PROGRAMS.replace("  db:", "  db:\n    deploy: {replicas: 0}"));
    world.wait_running("p/web-1");
    let made = world.ok(&["exec", "p/web-1", "--", "sh", "-c",
        "d=$(ls -d /var/www/html /usr/share/nginx/html 2>/dev/null | head -1); head -c 268435456 /dev/urandom >$d/big && sha256sum $d/big"]);
    let digest = made.split_whitespace().next().unwrap();
    let address = format!("{}:8080", world.host_address(2));
    let client = world.client(&["http-client", "--address", &address, "--path", "/big", "--seconds", "15"]);
    let moves = around(&world, "p/web-1");
    assert!(moves.len() >= 3);
    let report = client.finish();
    assert_eq!(report["sha256"], digest);
    world.down();
}

#[test]
fn what_cannot_move_is_refused_beforehand() {
    let Some(world) = World::up("refuse", 2, &[]) else { return };
    let directory = tempfile::tempdir().unwrap();
    world.apply(&format!(
        "name: u\nservices:\n  a:\n    image: oci:${{IMAGES}}/busybox:latest\n    command: [sleep, '1000']\n    volumes: ['{}:/outside']\n",
        directory.path().display()
    ));
    world.wait_running("u/a-1");
    let view =
        world.wait("u/a-1", "known not to be movable", |c| c["status"]["movable"]["because"] != serde_json::json!([]));
    let from = view["host"].as_str().unwrap();
    let said = world.refused(1, &["migrate", "u/a-1", "--to", if from == "h1" { "h2" } else { "h1" }]);
    assert!(said.contains("is a path of this host") && said.contains("named volume"), "{said}");
    let said = world.refused(1, &["migrate", "u/a-1", "--to", "h9"]);
    assert!(said.contains("there is no host h9"), "{said}");
    let said = world.refused(1, &["migrate", "u/a-1", "--to", from]);
    assert!(said.contains("it is there already"), "{said}");
    assert_eq!(world.json(&["move", "list"]), serde_json::json!([]));
    world.down();
}

/// How memory is copied, and how long it may stand still for it.
#[test]
fn what_is_asked_of_a_move_is_kept() {
    let Some(world) = World::up("asked", 2, &["--link", "10gbit"]) else { return };
    world.apply(WORKLOAD);
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    let mut from = world.host_of("t/w-1");
    let other = |host: &str| if host == "h1" { "h2" } else { "h1" };
    let soft_dirty = matches!(godwit_memory::check_tracking(), Ok(godwit_memory::Means::SoftDirty));
    for mode in ["stop-and-copy", "pre-copy"] {
        let to = other(&from);
        let done = world.json(&["migrate", "t/w-1", "--to", to, "--mode", mode]);
        assert_eq!((&done["outcome"]["state"], &done["options"]["mode"]), (&"done".into(), &mode.into()), "{done:#}");
        let stood_still = &done["summary"]["stood_still"];
        let why = if mode == "pre-copy" { Value::Null } else { "stop-and-copy was asked for".into() };
        assert_eq!(*stood_still, why, "{done:#}");
        // Where the kernel's means needs it, it stood still for a moment in each round, and that is told.
        let paused_ms = done["summary"]["paused_ms"].as_f64();
        assert_eq!(paused_ms.is_some_and(|ms| ms > 0.0), soft_dirty && mode == "pre-copy", "{done:#}");
        println!("{mode}: downtime {} ms, paused {paused_ms:?} ms", done["summary"]["downtime_ms"]);
        from = to.to_owned();
    }
    let said = world.refused(1, &["migrate", "t/w-1", "--to", other(&from), "--max-downtime", "1"]);
    assert!(said.contains("it would stand still for about") && said.contains("--max-downtime"), "{said}");
    // The next move to the same host finds nothing of the one that was given up, however soon it comes.
    for _ in 0..8 {
        let to = other(&from);
        world.refused(1, &["migrate", "t/w-1", "--to", to, "--max-downtime", "1"]);
        let done = world.migrate("t/w-1", to);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        from = to.to_owned();
    }
    let stop = ["migrate", "t/w-1", "--to", other(&from), "--mode", "stop-and-copy", "--max-downtime", "60000"];
    let said = world.refused(1, &stop);
    assert!(said.contains("memory cannot be copied while the container runs: stop-and-copy was asked for"), "{said}");
    assert_eq!(world.host_of("t/w-1"), from);
    let after = status(&world);
    assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    client.finish();
    world.down();
}

const CHECKED: &str = r#"
name: c
services:
  w:
    image: oci:${IMAGES}/busybox:latest
    command: [sleep, "100000"]
    healthcheck: {test: [CMD, sleep, "1000"], interval: 1s, timeout: 300s}
"#;

/// A check that is at work all the time makes way; somebody's session does not, and is not forgotten.
#[test]
fn a_health_check_is_not_in_the_way_of_a_move() {
    let Some(world) = World::up("checked", 2, &[]) else { return };
    world.apply(CHECKED);
    world.wait_running("c/w-1");
    let checks = || world.ok(&["exec", "c/w-1", "--", "sh", "-c", "ps | grep -c 'slee[p] 1000$' || true"]);
    let checked = || world.until(Duration::from_secs(10), || (checks().trim() == "1").then_some(()));
    for _ in 0..3 {
        assert!(checked().is_some(), "{}", world.logs());
        let container = world.container("c/w-1").unwrap();
        assert_eq!(container["status"]["movable"]["because"], serde_json::json!([]), "{container:#}");
        let to = if container["host"] == "h1" { "h2" } else { "h1" };
        let done = world.migrate("c/w-1", to);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
    }
    assert!(checked().is_some(), "checks go on at the other host");
    assert_ne!(world.container("c/w-1").unwrap()["health"], "unhealthy", "a check that made way is no failed one");

    let mut session = world.godwit(&["exec", "c/w-1", "--", "sh", "-c", "echo in; sleep 1000"]);
    let mut session = session.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 2];
    std::io::Read::read_exact(session.stdout.as_mut().unwrap(), &mut said).unwrap();
    let to = if world.host_of("c/w-1") == "h1" { "h2" } else { "h1" };
    let refused = world.refused(1, &["migrate", "c/w-1", "--to", to]);
    assert!(refused.contains("1 exec session is open"), "{refused}");
    session.kill().unwrap();
    session.wait().unwrap();
    world.down();
}

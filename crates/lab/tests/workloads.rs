//! The workloads through their own program: they see what is right, and they see what is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_lab::workload::{Report, Status, write_image};
use godwit_lab::{Lab, LabName, LabSpec, Node};
use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit-workload");

/// A running server; killed when the test ends, however it ends.
struct Server {
    child: Child,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        Self::start_by(Command::new(PROGRAM), "127.0.0.1")
    }

    fn start_by(mut command: Command, listen: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = command
            .args(["memory-files-streams", "--port", "0", "--listen", listen, "--memory-mib", "16", "--dir"])
            .arg(directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.trim().strip_prefix("listening ").expect("the server says where it listens").parse().unwrap();
        Self { child, address, _directory: directory }
    }

    fn status(&self) -> Status {
        godwit_lab::workload::status(self.address).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Client {
    child: Child,
}

impl Client {
    /// Returns when data flows on all connections.
    fn start(arguments: &[&str]) -> Self {
        Self::start_by(Command::new(PROGRAM), arguments)
    }

    fn start_by(mut command: Command, arguments: &[&str]) -> Self {
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        stderr.read_line(&mut line).unwrap();
        assert_eq!(line, "connected\n");
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::stderr()));
        Self { child }
    }

    /// Closes standard input, waits, and returns the report and whether the exit code was 0.
    fn finish(mut self) -> (Report, bool) {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().unwrap();
        (serde_json::from_slice(&output.stdout).unwrap(), output.status.success())
    }
}

#[test]
fn every_byte_in_both_directions_and_everything_inside() {
    let server = Server::start();
    let address = server.address.to_string();
    let before = server.status();
    let client = Client::start(&["client", "--address", &address, "--connections", "4", "--seconds", "2"]);
    let (report, success) = client.finish();
    let after = server.status();
    println!("{report:?}\n{after:?}");
    assert!(success && report.ok(), "{report:?}");
    assert!(report.bytes_sent > 100_000 && report.bytes_received > 100_000, "{report:?}");
    assert_eq!(after.stream_bytes_received, report.bytes_sent);
    assert!(report.client_gap_ms > 0.5 && report.client_gap_ms < 1_000.0, "{report:?}");
    assert!(after.ok && after.instance == before.instance && after.pid == server.child.id());
    for (what, count) in [
        ("memory", after.memory_passes),
        ("files", after.file_rounds),
        ("wires", after.wire_messages),
        ("timer", after.timer_ticks),
    ] {
        assert!(count > 5, "{what}: {after:?}");
    }
    assert_eq!((after.streams_accepted, after.streams_broken), (4, 0));
    let status = Command::new(PROGRAM).args(["status", "--address", &address]).output().unwrap();
    assert!(status.status.success() && serde_json::from_slice::<Status>(&status.stdout).unwrap().ok);
}

#[test]
fn a_pause_is_a_gap_of_its_length_and_no_error() {
    let server = Server::start();
    let client = Client::start(&["client", "--address", &server.address.to_string(), "--until-stdin-closes"]);
    let pause = Duration::from_millis(300);
    server.signal(Signal::STOP);
    let stopped = Instant::now();
    std::thread::sleep(pause);
    server.signal(Signal::CONT);
    let stopped = stopped.elapsed();
    // The stream must flow again before it is ended.
    let received = server.status().stream_bytes_received;
    while server.status().stream_bytes_received < received + 10_000 {
        assert!(stopped.as_secs() < 30);
        std::thread::sleep(Duration::from_millis(5));
    }
    let (report, success) = client.finish();
    println!("paused {stopped:?}: {report:?}");
    assert!(success);
    let (gap, paused) = (report.client_gap_ms, stopped.as_secs_f64() * 1e3);
    assert!(gap > pause.as_secs_f64() * 1e3 * 0.95 && gap < paused + 500.0, "{gap} for {paused}");
    assert!(server.status().ok);
}

/// Passes one connection on and flips one bit of byte `at` of one direction. Returns its address.
fn proxy(target: SocketAddr, to_server: Option<u64>, to_client: Option<u64>) -> SocketAddr {
    fn pass(mut from: TcpStream, mut to: TcpStream, flip: Option<u64>) {
        let mut position = 0_u64;
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if let Some(at) = flip.and_then(|f| f.checked_sub(position)).filter(|a| *a < length as u64) {
                buffer[at as usize] ^= 0x10;
            }
            position += length as u64;
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), TcpStream::connect(target).unwrap());
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || pass(from, to, to_server));
            std::thread::spawn(move || pass(server, client, to_client));
        }
    });
    address
}

#[test]
fn one_wrong_bit_from_the_server_is_seen_by_the_client() {
    let server = Server::start();
    let address = proxy(server.address, None, Some(50_000)).to_string();
    let output = Command::new(PROGRAM).args(["client", "--address", &address, "--seconds", "1"]).output().unwrap();
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success() && report.errors > 0, "{report:?}");
    assert!(report.messages[0].contains("from the server is wrong"), "{report:?}");
    assert!(server.status().ok, "the server has received only what is right");
}

#[test]
fn one_wrong_bit_from_the_client_ends_the_server() {
    let mut server = Server::start();
    let address = proxy(server.address, Some(50_000), None).to_string();
    let output = Command::new(PROGRAM).args(["client", "--address", &address, "--seconds", "1"]).output().unwrap();
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success(), "{report:?}");
    // 28 bytes of greeting come before the stream.
    assert!(report.messages[0].contains("the server found byte 49972 to be wrong"), "{report:?}");
    let status = server.status();
    assert!(!status.ok && status.violations[0].contains("49972"), "{status:?}");
    assert_eq!(server.child.wait().unwrap().code(), Some(1));
}

#[test]
fn changed_files_and_a_killed_child_end_the_server() {
    let mut server = Server::start();
    let sparse = server._directory.path().join("sparse");
    fs::write(&sparse, vec![1; 64 << 20]).unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(1));

    let mut server = Server::start();
    let pid = server.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(child, Signal::KILL).unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_lost_connection_is_an_error() {
    let mut server = Server::start();
    let client = Client::start(&["client", "--address", &server.address.to_string(), "--until-stdin-closes"]);
    server.signal(Signal::KILL);
    assert_eq!(server.child.wait().unwrap().signal(), Some(9));
    let (report, success) = client.finish();
    assert!(!success && report.errors > 0, "{report:?}");
}

/// Answers each command with the next number, leaving out the number `skip`.
fn counting_server(skip: u64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        for connection in listener.incoming() {
            let connection = connection.unwrap();
            let mut to = connection.try_clone().unwrap();
            // Five lines are one INCR of one key.
            for (line, _) in BufReader::new(connection).lines().enumerate() {
                if line % 5 == 4 {
                    let number = NUMBER.fetch_add(1, Ordering::Relaxed) + 1;
                    let number = if number == skip { NUMBER.fetch_add(1, Ordering::Relaxed) + 1 } else { number };
                    if to.write_all(format!(":{number}\r\n").as_bytes()).is_err() {
                        break;
                    }
                }
            }
        }
    });
    address
}

#[test]
fn redis_numbers_come_in_order() {
    let run = |skip| {
        let address = counting_server(skip).to_string();
        let output =
            Command::new(PROGRAM).args(["redis-client", "--address", &address, "--seconds", "0.5"]).output().unwrap();
        (serde_json::from_slice::<Report>(&output.stdout).unwrap(), output.status.success())
    };
    let (report, success) = run(50);
    assert!(!success && report.errors == 1 && report.messages[0].contains("51 came after 49"), "{report:?}");
    let (report, success) = run(0);
    assert!(success && report.requests > 100, "{report:?}");
}

#[test]
fn a_real_redis_is_counted_filled_and_checked() {
    if Command::new("redis-server").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: needs redis-server");
        return;
    }
    struct Kill(Child);
    impl Drop for Kill {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    // Redis cannot pick a port and say which: one that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let address = format!("127.0.0.1:{port}");
    let mut redis = Kill(
        Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", ""])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let ready =
        BufReader::new(redis.0.stdout.as_mut().unwrap()).lines().any(|l| l.unwrap().contains("accept connections"));
    assert!(ready);
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (
            serde_json::from_slice::<Report>(&output.stdout).unwrap_or_else(|_| panic!("{error}")),
            output.status.success(),
        )
    };
    let data = ["--address", &address, "--mib", "32"];
    assert!(run(&[&["redis-fill"], &data[..]].concat()).1);
    let (report, success) = run(&[&["redis-check"], &data[..]].concat());
    assert!(success && report.bytes_received == 32 << 20, "{report:?}");
    let (report, success) = run(&["redis-client", "--address", &address, "--seconds", "0.5"]);
    assert!(success && report.requests > 50, "{report:?}");
    let (report, success) = run(&[&["redis-check", "--seed", "2"], &data[..]].concat());
    assert!(!success && report.errors == 512, "other content is wrong: {report:?}");
}

/// Serves `body` once, pausing in the middle; announces `announced` bytes.
fn file_server(body: Vec<u8>, announced: usize, pause: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = connection.read(&mut request).unwrap();
        let (first, second) = body.split_at(body.len() / 2);
        let _ = connection.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n").as_bytes());
        let _ = connection.write_all(first);
        std::thread::sleep(pause);
        let _ = connection.write_all(second);
    });
    address
}

#[test]
fn http_bodies_are_hashed_and_gaps_measured() {
    let body: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let run = |announced: usize, more: &[&str]| {
        let address = file_server(body.clone(), announced, Duration::from_millis(200)).to_string();
        let output = Command::new(PROGRAM)
            .args(["http-client", "--address", &address, "--path", "/f"])
            .args(more)
            .output()
            .unwrap();
        (serde_json::from_slice::<Report>(&output.stdout).unwrap(), output.status.success())
    };
    let (report, success) = run(body.len(), &[]);
    assert!(success && report.bytes_received == body.len() as u64, "{report:?}");
    assert!((190.0..1_000.0).contains(&report.client_gap_ms), "{report:?}");
    let right = report.sha256.unwrap();
    let (report, success) = run(body.len(), &["--sha256", &right, "--seconds", "0.7"]);
    assert!(success && report.elapsed_ms > 600.0, "{report:?}");
    let (report, success) = run(body.len(), &["--sha256", &"0".repeat(64)]);
    assert!(!success && report.messages[0].contains(&right), "{report:?}");
    let (report, success) = run(body.len() + 1, &[]);
    assert!(!success && report.errors == 1, "a body that is too short: {report:?}");
}

#[test]
fn the_image_holds_all_that_the_program_needs() {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    let summary = write_image(Path::new(PROGRAM), &["memory-files-streams"], &layout, "workload").unwrap();
    assert!(write_image(Path::new(PROGRAM), &[], &layout, "workload").is_err(), "an existing directory is left alone");
    let again = write_image(Path::new(PROGRAM), &["memory-files-streams"], &directory.path().join("again"), "workload")
        .unwrap();
    assert_eq!(summary.digest, again.digest, "the same program gives the same image");
    println!("{summary:?}");

    let blob = |digest: &str| layout.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let sum = Command::new("sha256sum").arg(&path).output().unwrap();
        assert!(String::from_utf8(sum.stdout).unwrap().starts_with(path.file_name().unwrap().to_str().unwrap()));
    }
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(blob(&summary.digest)).unwrap()).unwrap();
    let layer = blob(manifest["layers"][0]["digest"].as_str().unwrap());
    let root = directory.path().join("root");
    tar::Archive::new(fs::File::open(layer).unwrap()).unpack(&root).unwrap();
    assert!(root.join("tmp").is_dir() && root.join("data").is_dir());
    if rustix::process::geteuid().is_root() {
        let output = Command::new("chroot").arg(&root).args(["/usr/bin/godwit-workload", "--help"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    } else {
        println!("skipped in part: needs root");
    }
}

#[test]
fn over_a_lab_link_a_cut_is_a_gap() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    struct Down(LabName);
    impl Drop for Down {
        fn drop(&mut self) {
            let _ = Lab::down_by_name(&self.0);
        }
    }
    let name = LabName::new(format!("t-work-{}", std::process::id())).unwrap();
    let _down = Down(name.clone());
    let spec = LabSpec { start_daemons: false, link: Some("1gbit".parse().unwrap()), ..LabSpec::new(name, 1, PROGRAM) };
    let lab = Lab::up(spec).unwrap();
    let h1 = Node::Host(1);
    let server = Server::start_by(lab.exec(h1, &[PROGRAM]).unwrap(), &h1.address().to_string());
    let address = server.address.to_string();
    let client = Client::start_by(
        lab.exec(Node::Client, &[PROGRAM]).unwrap(),
        &["client", "--address", &address, "--connections", "3", "--until-stdin-closes"],
    );
    let status = || lab.visit(Node::Client, || server.status()).unwrap();
    lab.cut_link(h1).unwrap();
    std::thread::sleep(Duration::from_millis(150));
    lab.restore_link(h1).unwrap();
    let (received, deadline) = (status().stream_bytes_received, Instant::now() + Duration::from_secs(20));
    while status().stream_bytes_received < received + 100_000 {
        assert!(Instant::now() < deadline, "the streams did not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let (report, success) = client.finish();
    println!("cut for 150 ms: {report:?}");
    assert!(success && report.client_gap_ms >= 140.0, "{report:?}");
    assert!(status().ok);
    drop(server);
    lab.down().unwrap();
    assert_eq!(Lab::leftovers(&lab.spec().name), Vec::<String>::new());
}

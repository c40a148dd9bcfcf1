//! The workloads that are there for their amount: a writer of a given rate, thousands of idle connections.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_lab::workload::{Report, Status, status};

const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit-workload");

struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks until the status is as wished.
fn wait(address: SocketAddr, wished: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let found = status(address).unwrap();
        if wished(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{found:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_writer_writes_verifies_and_is_never_faster_than_asked() {
    const PAGES_PER_SECOND: f64 = 40e6 / 4096.0;
    let mut child = Command::new(PROGRAM)
        .args(["memory-writer", "--port", "0", "--listen", "127.0.0.1", "--memory-mib", "16", "--mb-per-second", "40"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let _server = Kill(child);
    let address: SocketAddr = line.trim().strip_prefix("listening ").unwrap().parse().unwrap();
    let (before, begun) = (status(address).unwrap(), Instant::now());
    let client = Command::new(PROGRAM)
        .args(["client", "--address", &address.to_string(), "--connections", "2", "--seconds", "1"])
        .args(["--interval-ms", "100"])
        .output()
        .unwrap();
    let report: Report = serde_json::from_slice(&client.stdout).unwrap();
    assert!(report.ok() && report.requests > 10, "{report:?}");
    let arrivals: u64 = report.intervals.iter().map(|i| i.arrivals).sum();
    assert_eq!(arrivals, report.requests, "intervals of all connections, each arrival once: {report:?}");
    let after = wait(address, |found| found.memory_passes >= before.memory_passes + 2);
    let written = (after.memory_pages_written - before.memory_pages_written) as f64;
    assert!(after.ok && written > 0.0, "{after:?}");
    // Two ticks may lie around the time that was measured.
    let most = PAGES_PER_SECOND * (begun.elapsed().as_secs_f64() + 0.02);
    assert!(written <= most * 1.01, "{written} pages, at most {most}");
}

/// Answers PING on every connection, on `mute` only once.
fn pong_server(mute: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (number, connection) in listener.incoming().enumerate() {
            let mut connection = connection.unwrap();
            std::thread::spawn(move || {
                let mut ping = [0; 14];
                while connection.read_exact(&mut ping).is_ok() {
                    assert_eq!(&ping, b"*1\r\n$4\r\nPING\r\n");
                    connection.write_all(b"+PONG\r\n").unwrap();
                    if number == mute {
                        break;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn every_idle_connection_is_asked_again() {
    let run = |mute| {
        let address = pong_server(mute).to_string();
        let output = Command::new(PROGRAM)
            .args(["redis-idle", "--address", &address, "--connections", "50", "--seconds", "0.3"])
            .output()
            .unwrap();
        (serde_json::from_slice::<Report>(&output.stdout).unwrap(), output.status.success())
    };
    let (report, success) = run(usize::MAX);
    assert!(success && report.requests == 100 && report.connections == 50, "{report:?}");
    let (report, success) = run(30);
    assert!(!success && report.errors == 1 && report.requests == 99, "{report:?}");
    assert!(report.messages[0].starts_with("connection 30: "), "{report:?}");
}

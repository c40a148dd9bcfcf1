//! A program whose memory is filled, and the world of such a test.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use godwit_memory::{FillerProcess, Key, PageStore};

use super::{PAGE, victim_path};

/// As in examples/victim/hold.rs.
pub const BASE: u64 = 0x6000_0000_0000;
pub const PAGES: u64 = 96 * 256;
pub const INNER: i32 = 17;
pub struct World {
    pub directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> World {
        World { directory: tempfile::Builder::new().prefix("godwit-process-").tempdir_in("/dev/shm").unwrap() }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("lazy-pages.socket")
    }

    pub fn start(&self) -> FillerProcess {
        let mut command = Command::new(victim_path());
        command.arg("filler").arg(self.directory.path());
        FillerProcess::start(command, self.directory.path()).unwrap()
    }

    pub fn loaded(&self) -> FillerProcess {
        let filler = self.start();
        filler.load(store()).unwrap();
        filler
    }
}

pub fn store() -> Arc<PageStore> {
    let store = PageStore::new().unwrap();
    let mut content = vec![0; 512 * PAGE];
    for first in (0..PAGES).step_by(512) {
        for (n, page) in content.chunks_mut(PAGE).enumerate() {
            page[..8].copy_from_slice(&(first + n as u64 + 1).to_ne_bytes());
        }
        store.put(Key::Process(INNER), BASE + first * PAGE as u64, 0, &content).unwrap();
    }
    Arc::new(store)
}

/// A program that is filled; killed at the end.
pub struct Held {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Held {
    pub fn start(world: &World) -> Held {
        let mut child = Command::new(victim_path())
            .arg("hold")
            .arg(world.socket())
            .arg(INNER.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut held = Held { child, input, output };
        assert_eq!(held.line(), "ready");
        held
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub fn tell(&mut self, what: &str) {
        writeln!(self.input, "{what}").unwrap();
    }

    pub fn ask(&mut self, what: &str) -> String {
        self.tell(what);
        self.line()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

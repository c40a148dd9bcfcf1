use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::wire::{Accept, FrameReader, FrameWriter};

/// A container whose criu writes pages without end and, once nobody takes them, needs a while to clean up.
#[derive(Default)]
struct Slow {
    done: Arc<Mutex<Vec<&'static str>>>,
}

impl Slow {
    fn note(&self, what: &'static str) {
        self.done.lock().unwrap().push(what);
    }
}

/// It has no processes.
struct Still;

impl Pause for Still {
    fn still(&self, work: &mut dyn FnMut()) -> std::io::Result<()> {
        work();
        Ok(())
    }
}

impl Workload for Slow {
    fn trees(&self) -> Vec<(String, PathBuf)> {
        Vec::new()
    }
    fn progress(&mut self, _: Phase, _: Progress) {}
    fn pids(&self) -> Result<Vec<i32>, PartError> {
        Ok(Vec::new())
    }
    fn pause(&self) -> Arc<dyn Pause> {
        Arc::new(Still)
    }
    fn options(&self) -> MoveOptions {
        MoveOptions::default()
    }
    fn connections(&self) -> u32 {
        1
    }
    async fn lane(&mut self) -> Result<Lane, PartError> {
        Err("version 1 has one connection".into())
    }
    fn fixed_ms(&self) -> f64 {
        FIXED_MS
    }
    fn slow_down(&mut self, _: u32) -> Result<bool, PartError> {
        Ok(false)
    }
    fn full_speed(&mut self) {}
    fn hidden_writes(&self) -> Option<String> {
        None
    }
    async fn before_freeze(&mut self, _: bool) -> Result<serde_json::Value, PartError> {
        Ok(serde_json::Value::Null)
    }
    async fn freeze(&mut self) -> Result<Vec<(String, Vec<u8>)>, PartError> {
        self.note("frozen");
        Ok(Vec::new())
    }
    async fn dump(&mut self, memory: DumpMemory) -> Result<PathBuf, PartError> {
        let DumpMemory::Stream(mut pages) = memory else { return Err("version 1 carries memory in the dump".into()) };
        while pages.write_all(&[7; 4096]).await.is_ok() {}
        // What it may still hear from the page server is over as well.
        let mut rest = Vec::new();
        let _ = pages.read_to_end(&mut rest).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.note("criu has ended");
        Err("nobody took the pages".into())
    }
    fn still_needed(&mut self) {}
    async fn thaw(&mut self) {
        self.note("thawed");
    }
}

/// criu leaves the cgroup frozen, as it found it: a container thawed before that stood still for ever.
#[tokio::test]
async fn a_container_is_not_thawed_before_criu_has_ended() {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let done = Arc::default();
    let mut slow = Slow { done: Arc::clone(&done) };
    let (reader, writer) = tokio::io::split(ours);
    let sending = tokio::spawn(async move { send(reader, writer, "m", "c", &mut slow).await });
    let (reader, writer) = tokio::io::split(theirs);
    let (mut reader, mut writer) = (FrameReader::new(reader), FrameWriter::new(writer));
    assert_eq!(reader.next().await.unwrap().kind, Kind::Offer);
    writer.send_json(Kind::Accept, &Accept { version: OLDEST_VERSION, connections: 1 }).await.unwrap();
    writer.flush().await.unwrap();
    while reader.next().await.unwrap().kind != Kind::Pages {}
    drop((reader, writer));
    let error = sending.await.unwrap().unwrap_err();
    assert!(matches!(error, SendError::Wire { phase: Phase::Freeze, .. }), "{error:?}");
    assert_eq!(*done.lock().unwrap(), ["frozen", "criu has ended", "thawed"]);
}

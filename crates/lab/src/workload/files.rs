//! Files that are written, renamed, mapped and verified all the time.

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::blocks::{BLOCK_BYTES, Blocks};
use super::health::{Health, count};
use super::pattern;

const ROUND_MS: u64 = 20;
/// Every so many rounds whole files and attributes are verified and the log is synced.
const SLOW_EVERY: u64 = 32;
const RECORD_BYTES: usize = 256;
/// The log is renamed and begun again at this size, so that disk use is bounded.
const MAX_LOG_BYTES: u64 = 1 << 20;
const DELETED_BLOCKS: usize = 64;
const MAPPED_BLOCKS: usize = 256;
/// A sparse file of 64 MiB with one written block at the beginning of each 4 MiB.
const SPARSE_BLOCKS: usize = 16;
const SPARSE_STRIDE_BYTES: u64 = 4 << 20;
const STATIC_BYTES: usize = 64 << 10;
/// What one sequential read takes; it does not divide the size of the file, so positions differ.
const READ_BYTES: usize = 1000;
const OLD_MTIME_S: u64 = 1_000_000_000;

pub(crate) struct Files {
    directory: PathBuf,
    seed: u64,
    round: u64,
    log: File,
    /// Bytes in logs that were begun before the present one.
    log_base: u64,
    log_bytes: u64,
    deleted: (File, Blocks),
    sparse: (File, Blocks),
    mapped: (File, MmapRegion, Blocks),
    reader: File,
    reader_position: u64,
}

fn io_error(what: &str) -> impl Fn(io::Error) -> String {
    move |error| format!("files: {what}: {error}")
}

impl Files {
    /// Makes the files in `directory`, in place of those that an earlier start has left there.
    pub fn new(directory: &Path, seed: u64) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let open = |name: &str| {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(directory.join(name))
        };
        for name in ["log.old", "name-1", "name-2", "link"] {
            match fs::remove_file(directory.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let blocks = |file: &File, tag: u64, number: usize, stride: u64| -> io::Result<Blocks> {
            let blocks = Blocks::new(seed ^ tag, number);
            for index in 0..number {
                file.write_all_at(&blocks.content(index), index as u64 * stride)?;
            }
            Ok(blocks)
        };
        let deleted = open("deleted")?;
        let deleted_blocks = blocks(&deleted, 1, DELETED_BLOCKS, BLOCK_BYTES as u64)?;
        fs::remove_file(directory.join("deleted"))?;

        let sparse = open("sparse")?;
        sparse.set_len(SPARSE_BLOCKS as u64 * SPARSE_STRIDE_BYTES)?;
        let sparse_blocks = blocks(&sparse, 2, SPARSE_BLOCKS, SPARSE_STRIDE_BYTES)?;

        let mapped = open("mapped")?;
        let mapped_blocks = blocks(&mapped, 3, MAPPED_BLOCKS, BLOCK_BYTES as u64)?;
        let region = MmapRegion::from_file(FileOffset::new(mapped.try_clone()?, 0), MAPPED_BLOCKS * BLOCK_BYTES)
            .map_err(io::Error::other)?;

        let mut content = vec![0; STATIC_BYTES];
        pattern::fill(seed ^ 4, 0, &mut content);
        open("static")?.write_all(&content)?;
        let named = open("name-1")?;
        named.set_permissions(Permissions::from_mode(0o640))?;
        named.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(OLD_MTIME_S)))?;
        fs::hard_link(directory.join("name-1"), directory.join("name-2"))?;
        symlink("name-1", directory.join("link"))?;
        Ok(Self {
            directory: directory.to_owned(),
            seed,
            round: 0,
            log: open("log")?,
            log_base: 0,
            log_bytes: 0,
            deleted: (deleted, deleted_blocks),
            sparse: (sparse, sparse_blocks),
            mapped: (mapped, region, mapped_blocks),
            reader: File::open(directory.join("static"))?,
            reader_position: 0,
        })
    }

    /// Works until the first violation, for ever if there is none.
    pub fn run(mut self, health: &Health) {
        loop {
            if let Err(what) = self.work() {
                return health.violate(what);
            }
            count(&health.file_rounds, 1);
            std::thread::sleep(Duration::from_millis(ROUND_MS));
        }
    }

    fn work(&mut self) -> Result<(), String> {
        self.round += 1;
        self.append()?;
        self.replace()?;
        self.rewrite_blocks()?;
        self.rewrite_mapped()?;
        self.read_on()?;
        if self.round.is_multiple_of(SLOW_EVERY) {
            self.log.sync_all().map_err(io_error("sync the log"))?;
            self.check_log()?;
            self.check_attributes()?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// One more record at the end of the log, through the descriptor's own position.
    fn append(&mut self) -> Result<(), String> {
        if self.log_bytes >= MAX_LOG_BYTES {
            self.check_log()?;
            fs::rename(self.path("log"), self.path("log.old")).map_err(io_error("rename the log"))?;
            self.log = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(self.path("log"))
                .map_err(io_error("begin a log"))?;
            self.log_base += self.log_bytes;
            self.log_bytes = 0;
        }
        let mut record = [0; RECORD_BYTES];
        pattern::fill(self.seed ^ 5, self.log_base + self.log_bytes, &mut record);
        self.log.write_all(&record).map_err(io_error("write to the log"))?;
        self.log_bytes += RECORD_BYTES as u64;
        Ok(())
    }

    fn check_log(&self) -> Result<(), String> {
        let content = fs::read(self.path("log")).map_err(io_error("read the log"))?;
        if content.len() as u64 != self.log_bytes {
            return Err(format!("files: the log has {} bytes, {} were written", content.len(), self.log_bytes));
        }
        match pattern::first_difference(self.seed ^ 5, self.log_base, &content) {
            None => Ok(()),
            Some(at) => Err(format!("files: the log is wrong at byte {}", at - self.log_base)),
        }
    }

    /// A file replaced as a whole: written beside, synced, renamed.
    fn replace(&self) -> Result<(), String> {
        let mut content = vec![0; 512];
        pattern::fill(self.seed ^ self.round, 0, &mut content);
        let beside = self.path("state.new");
        let mut file = File::create(&beside).map_err(io_error("create state.new"))?;
        file.write_all(&content).and_then(|()| file.sync_all()).map_err(io_error("write state.new"))?;
        fs::rename(&beside, self.path("state")).map_err(io_error("rename state.new"))?;
        match fs::read(self.path("state")).map_err(io_error("read state"))? == content {
            true => Ok(()),
            false => Err(format!("files: state is not what round {} wrote", self.round)),
        }
    }

    /// The deleted and the sparse file: verify one block, write its next version.
    fn rewrite_blocks(&mut self) -> Result<(), String> {
        let round = self.round;
        for (what, stride, (file, blocks)) in [
            ("deleted file", BLOCK_BYTES as u64, &mut self.deleted),
            ("sparse file", SPARSE_STRIDE_BYTES, &mut self.sparse),
        ] {
            let index = (round % blocks.len() as u64) as usize;
            let mut found = [0; BLOCK_BYTES];
            file.read_exact_at(&mut found, index as u64 * stride).map_err(io_error(what))?;
            blocks.check(what, index, &found)?;
            file.write_all_at(&blocks.next(index), index as u64 * stride).map_err(io_error(what))?;
        }
        let hole = (round % SPARSE_BLOCKS as u64) * SPARSE_STRIDE_BYTES + SPARSE_STRIDE_BYTES / 2;
        let mut found = [1; BLOCK_BYTES];
        self.sparse.0.read_exact_at(&mut found, hole).map_err(io_error("sparse file"))?;
        if found.iter().any(|&b| b != 0) {
            return Err(format!("files: the hole at byte {hole} of the sparse file is not zero"));
        }
        Ok(())
    }

    /// Written through the mapping and read through the descriptor in one round, the other way
    /// round in the next.
    fn rewrite_mapped(&mut self) -> Result<(), String> {
        let (file, region, blocks) = &mut self.mapped;
        let memory = region.as_volatile_slice();
        let index = ((self.round / 2) % blocks.len() as u64) as usize;
        let at = index * BLOCK_BYTES;
        let wrong = |error: &dyn std::fmt::Display| format!("files: mapped file: {error}");
        let (mut by_mapping, mut by_descriptor) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
        memory.read_slice(&mut by_mapping, at).map_err(|e| wrong(&e))?;
        file.read_exact_at(&mut by_descriptor, at as u64).map_err(|e| wrong(&e))?;
        blocks.check("mapped file, by the mapping", index, &by_mapping)?;
        blocks.check("mapped file, by the descriptor", index, &by_descriptor)?;
        let next = blocks.next(index);
        if self.round.is_multiple_of(2) {
            memory.write_slice(&next, at).map_err(|e| wrong(&e))
        } else {
            file.write_all_at(&next, at as u64).map_err(|e| wrong(&e))
        }
    }

    /// Reads on where the descriptor stands.
    fn read_on(&mut self) -> Result<(), String> {
        let position = self.reader.stream_position().map_err(io_error("ask for a position"))?;
        if position != self.reader_position {
            return Err(format!("files: a descriptor stands at byte {position} instead of {}", self.reader_position));
        }
        let mut found = [0; READ_BYTES];
        let length = self.reader.read(&mut found).map_err(io_error("read on"))?;
        if let Some(at) = pattern::first_difference(self.seed ^ 4, position, &found[..length]) {
            return Err(format!("files: the static file is wrong at byte {at}"));
        }
        self.reader_position += length as u64;
        if length < READ_BYTES {
            if self.reader_position != STATIC_BYTES as u64 {
                return Err(format!("files: the static file ends at byte {}", self.reader_position));
            }
            self.reader_position = self.reader.seek(SeekFrom::Start(0)).map_err(io_error("go back"))?;
        }
        Ok(())
    }

    fn check_attributes(&self) -> Result<(), String> {
        let first = fs::metadata(self.path("name-1")).map_err(io_error("look at name-1"))?;
        let second = fs::metadata(self.path("name-2")).map_err(io_error("look at name-2"))?;
        let target = fs::read_link(self.path("link")).map_err(io_error("look at link"))?;
        let facts = [
            ("mode", first.mode() & 0o7777 == 0o640),
            ("hard link", first.nlink() == 2 && first.ino() == second.ino()),
            ("time of change", first.mtime() == OLD_MTIME_S as i64),
            ("symlink", target == Path::new("name-1")),
        ];
        match facts.iter().find(|(_, right)| !right) {
            None => Ok(()),
            Some((what, _)) => Err(format!("files: the {what} of name-1 has changed")),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn world() -> (tempfile::TempDir, Files) {
        // In memory, because thousands of rounds are synced.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let files = Files::new(directory.path(), 9).unwrap();
        (directory, files)
    }

    #[test]
    fn all_is_well_until_something_is_changed_from_outside() {
        let (directory, mut files) = world();
        // Far enough for every block, the log's rename and the reader's way back.
        for _ in 0..5_000 {
            files.work().unwrap();
        }
        assert!(directory.path().join("log.old").exists());
        type Damage = fn(&Path, &mut Files);
        let damage: [(&str, Damage); 6] = [
            ("log", |d, _| OpenOptions::new().write(true).open(d.join("log")).unwrap().write_all_at(b"x", 5).unwrap()),
            ("static", |d, _| fs::write(d.join("static"), [0; STATIC_BYTES]).unwrap()),
            ("sparse", |d, _| {
                OpenOptions::new()
                    .write(true)
                    .open(d.join("sparse"))
                    .unwrap()
                    .write_all_at(&[1; 4 << 20], 1 << 20)
                    .unwrap()
            }),
            ("mapped", |d, _| {
                OpenOptions::new().write(true).open(d.join("mapped")).unwrap().write_all_at(&[1; 1 << 20], 0).unwrap()
            }),
            ("mode", |d, _| fs::set_permissions(d.join("name-2"), Permissions::from_mode(0o600)).unwrap()),
            ("position", |_, f| assert_eq!(f.reader.seek(SeekFrom::Start(7)).unwrap(), 7)),
        ];
        for (what, damage) in damage {
            let (directory, mut files) = world();
            for _ in 0..100 {
                files.work().unwrap();
            }
            damage(directory.path(), &mut files);
            assert!((0..600).any(|_| files.work().is_err()), "{what} was not found out");
        }
    }
}

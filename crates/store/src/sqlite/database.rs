//! Opening the file: lock, schema, settings.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::Options;
use crate::error::{OpenError, StoreFault};

/// `PRAGMA application_id` of our files: "gdwt".
const APPLICATION_ID: i64 = 0x6764_7774;
/// `PRAGMA user_version` that this program writes.
const SCHEMA_VERSION: i64 = 1;
/// The write-ahead log is cut back to this size, in bytes, after a checkpoint.
const WAL_KEEP_BYTES: i64 = 16 * 1024 * 1024;
/// Prepared statements kept per connection.
const STATEMENT_CACHE: usize = 32;

/// Keys are BLOBs so that "all keys below a prefix" is a range of bytes.
const SCHEMA: &str = "
CREATE TABLE counter (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO counter VALUES ('revision', 0), ('oldest', 1), ('lease', 0);
CREATE TABLE entry (
    key BLOB NOT NULL UNIQUE,
    value BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL,
    version INTEGER NOT NULL,
    lease INTEGER
);
CREATE INDEX entry_lease ON entry (lease) WHERE lease IS NOT NULL;
CREATE TABLE history (
    revision INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    key BLOB NOT NULL,
    value BLOB,
    create_revision INTEGER,
    version INTEGER,
    lease INTEGER,
    prev_revision INTEGER,
    PRIMARY KEY (revision, seq)
);
CREATE TABLE lease (
    id INTEGER PRIMARY KEY,
    ttl_ms INTEGER NOT NULL
);
";

/// Takes the lock, opens or creates the database. The lock lasts as long as the returned file.
pub(super) fn open(path: &Path, options: &Options) -> Result<(Connection, File), OpenError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(directory).map_err(|source| OpenError::Directory { path: directory.to_owned(), source })?;
    let lock = lock(path)?;
    let create = |source| OpenError::Create { path: path.to_owned(), source };
    // Made here and not by SQLite, so that nobody else can read it: environments may hold passwords.
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(create)?;
    let connection = writer_connection(path, options)?;
    // The file's name must survive a power cut too.
    File::open(directory).and_then(|d| d.sync_all()).map_err(create)?;
    Ok((connection, lock))
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let failed = |source| OpenError::LockFile { path: lock_path.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The text only serves the message; the lock is what counts.
            let _ = (&mut file).take(32).read_to_string(&mut pid);
            let pid = if pid.trim().is_empty() { "(unknown)".to_owned() } else { pid.trim().to_owned() };
            return Err(OpenError::InUse { path: path.to_owned(), pid });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

fn writer_connection(path: &Path, options: &Options) -> Result<Connection, OpenError> {
    let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => OpenError::Foreign { path: path.to_owned() },
        _ => OpenError::Database { path: path.to_owned(), source },
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    let version = pragma(&connection, "user_version").map_err(failed)?;
    let application = pragma(&connection, "application_id").map_err(failed)?;
    let objects: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(failed)?;
    if application != APPLICATION_ID && (objects > 0 || version != 0 || application != 0) {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    if version > SCHEMA_VERSION {
        return Err(OpenError::TooNew { path: path.to_owned(), found: version, known: SCHEMA_VERSION });
    }
    settings(&connection, options).map_err(failed)?;
    if version == 0 {
        let create = connection.transaction().map_err(failed)?;
        create.execute_batch(SCHEMA).map_err(failed)?;
        create.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
        create.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(failed)?;
        create.commit().map_err(failed)?;
    }
    Ok(connection)
}

fn settings(connection: &Connection, options: &Options) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.query_row(&format!("PRAGMA journal_size_limit = {WAL_KEEP_BYTES}"), [], |_| Ok(()))?;
    let page_bytes = u64::try_from(pragma(connection, "page_size")?).unwrap_or(4096).max(1);
    let pages = (options.max_bytes / page_bytes).clamp(1, u64::from(u32::MAX) - 1);
    connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

/// A connection that can only read. The writer's must be open before.
pub(super) fn reader_connection(path: &Path) -> Result<Connection, OpenError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)
        .map_err(|source| OpenError::Database { path: path.to_owned(), source })?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    Ok(connection)
}

/// Names what SQLite reported.
pub(super) fn fault(path: &Path, error: rusqlite::Error) -> StoreFault {
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreFault::Full { path },
        Some(ErrorCode::ReadOnly) => StoreFault::ReadOnly { path },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreFault::Damaged { path, source: Arc::new(error) }
        }
        _ => StoreFault::Failed { path, source: Arc::new(error) },
    }
}

/// Whether a failed COMMIT surely left nothing on disk. A write that failed did: the log's commit frame
/// comes last and carries a checksum. A failed fsync, or an error not known here, says nothing.
pub(super) fn surely_undone(error: &rusqlite::Error) -> bool {
    let write_failed = error.sqlite_error().is_some_and(|e| e.extended_code == rusqlite::ffi::SQLITE_IOERR_WRITE);
    write_failed || matches!(error.sqlite_error_code(), Some(ErrorCode::DiskFull | ErrorCode::ReadOnly))
}

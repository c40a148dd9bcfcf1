//! The SQL: reading entries and history, and applying one transaction.

use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::types::{
    Change, Commit, Condition, Conflict, Entry, LeaseId, Listing, MAX_LIST_ENTRIES, Op, Revision, Txn, WatchEvent,
};

/// The counters, as they are or will be on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    pub revision: Revision,
    /// Oldest revision that history still has in full.
    pub oldest: Revision,
    /// Latest lease number given out.
    pub lease: u64,
}

/// What a transaction came to.
pub(super) enum Applied {
    Done(Commit),
    NoSuchLease { key: String, lease: LeaseId },
}

// SQLite has signed integers only; revisions count up from 0 and cannot reach the sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn text(bytes: Vec<u8>) -> String {
    // Only strings are ever written; a damaged file must still not panic.
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

/// The first bytes after the range of keys that start with `prefix`; `None`: the range has no end.
/// UTF-8 has no byte 0xff, so the last byte can be counted up.
fn range_end(prefix: &str) -> Option<Vec<u8>> {
    let mut end = prefix.as_bytes().to_vec();
    let last = end.last_mut()?;
    *last = last.saturating_add(1);
    Some(end)
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: text(row.get(0)?),
        value: row.get(1)?,
        create_revision: Revision(unsigned(row.get(2)?)),
        mod_revision: Revision(unsigned(row.get(3)?)),
        version: unsigned(row.get(4)?),
        lease: row.get::<_, Option<i64>>(5)?.map(|id| LeaseId(unsigned(id))),
    })
}

const ENTRY: &str = "SELECT key, value, create_revision, mod_revision, version, lease FROM entry";

pub(super) fn get(connection: &Connection, key: &str) -> rusqlite::Result<Option<Entry>> {
    connection.prepare_cached(&format!("{ENTRY} WHERE key = ?1"))?.query_row([key.as_bytes()], entry).optional()
}

/// `None`: too many.
pub(super) fn list(connection: &mut Connection, prefix: &str) -> rusqlite::Result<Option<Listing>> {
    let snapshot = connection.transaction()?;
    let revision = counters(&snapshot)?.revision;
    let entries = entries_below(&snapshot, prefix, MAX_LIST_ENTRIES + 1)?;
    if entries.len() > MAX_LIST_ENTRIES {
        return Ok(None);
    }
    Ok(Some(Listing { entries, revision }))
}

fn entries_below(connection: &Connection, prefix: &str, limit: usize) -> rusqlite::Result<Vec<Entry>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    match range_end(prefix) {
        Some(end) => connection
            .prepare_cached(&format!("{ENTRY} WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT ?3"))?
            .query_map(params![prefix.as_bytes(), end, limit], entry)?
            .collect(),
        None => {
            connection.prepare_cached(&format!("{ENTRY} ORDER BY key LIMIT ?1"))?.query_map([limit], entry)?.collect()
        }
    }
}

pub(super) fn counters(connection: &Connection) -> rusqlite::Result<Counters> {
    let mut statement = connection.prepare_cached("SELECT value FROM counter WHERE name = ?1")?;
    let mut read = |name: &str| statement.query_row([name], |row| row.get(0)).map(unsigned);
    Ok(Counters { revision: Revision(read("revision")?), oldest: Revision(read("oldest")?), lease: read("lease")? })
}

/// Writes the counters that differ from `before`.
pub(super) fn save_counters(connection: &Connection, before: Counters, now: Counters) -> rusqlite::Result<()> {
    let all = [
        ("revision", before.revision.0, now.revision.0),
        ("oldest", before.oldest.0, now.oldest.0),
        ("lease", before.lease, now.lease),
    ];
    let mut statement = connection.prepare_cached("UPDATE counter SET value = ?2 WHERE name = ?1")?;
    for (name, _, value) in all.into_iter().filter(|(_, old, new)| old != new) {
        statement.execute(params![name, signed(value)])?;
    }
    Ok(())
}

/// Leases with their times to live in milliseconds.
pub(super) fn leases(connection: &Connection) -> rusqlite::Result<Vec<(LeaseId, u64)>> {
    connection
        .prepare("SELECT id, ttl_ms FROM lease")?
        .query_map([], |row| Ok((LeaseId(unsigned(row.get(0)?)), unsigned(row.get(1)?))))?
        .collect()
}

pub(super) fn insert_lease(connection: &Connection, lease: LeaseId, ttl_ms: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT INTO lease (id, ttl_ms) VALUES (?1, ?2)")?
        .execute([signed(lease.0), signed(ttl_ms)])?;
    Ok(())
}

fn lease_exists(connection: &Connection, lease: LeaseId) -> rusqlite::Result<bool> {
    connection.prepare_cached("SELECT 1 FROM lease WHERE id = ?1")?.exists([signed(lease.0)])
}

/// Deletes the lease and, in one revision, its keys. `None`: no such lease.
pub(super) fn end_lease(
    connection: &Connection,
    counters: &mut Counters,
    lease: LeaseId,
) -> rusqlite::Result<Option<Vec<WatchEvent>>> {
    let gone = connection.prepare_cached("DELETE FROM lease WHERE id = ?1")?.execute([signed(lease.0)])?;
    if gone == 0 {
        return Ok(None);
    }
    let attached: Vec<(String, Revision)> = connection
        .prepare_cached("SELECT key, mod_revision FROM entry WHERE lease = ?1 ORDER BY key")?
        .query_map([signed(lease.0)], |row| Ok((text(row.get(0)?), Revision(unsigned(row.get(1)?)))))?
        .collect::<rusqlite::Result<_>>()?;
    let revision = counters.revision.next();
    let mut events = Vec::with_capacity(attached.len());
    for (key, prev_revision) in attached {
        delete(connection, revision, key, prev_revision, &mut events)?;
    }
    if !events.is_empty() {
        counters.revision = revision;
    }
    Ok(Some(events))
}

/// Forgets history before `revision`.
pub(super) fn compact(connection: &Connection, counters: &mut Counters, revision: Revision) -> rusqlite::Result<()> {
    if revision > counters.oldest {
        connection.prepare_cached("DELETE FROM history WHERE revision < ?1")?.execute([signed(revision.0)])?;
        counters.oldest = revision;
    }
    Ok(())
}

/// Checks and applies one transaction; `events` comes in empty. On anything but success nothing is written,
/// because every check comes before the first change.
pub(super) fn apply(
    connection: &Connection,
    counters: &mut Counters,
    txn: &Txn,
    events: &mut Vec<WatchEvent>,
) -> rusqlite::Result<Applied> {
    for (index, compare) in txn.compares.iter().enumerate() {
        let actual = mod_revision(connection, &compare.key)?;
        let holds = match compare.condition {
            Condition::ModRevision(expected) => actual == Some(expected),
            Condition::Absent => actual.is_none(),
            Condition::Exists => actual.is_some(),
        };
        if !holds {
            return Ok(Applied::Done(Commit::Conflict(Conflict { index, compare: compare.clone(), actual })));
        }
    }
    for op in &txn.then {
        if let Op::Put { key, lease: Some(lease), .. } = op
            && !lease_exists(connection, *lease)?
        {
            return Ok(Applied::NoSuchLease { key: key.clone(), lease: *lease });
        }
    }
    let revision = counters.revision.next();
    for op in &txn.then {
        match op {
            Op::Put { key, value, lease } => put(connection, revision, key, value, *lease, events)?,
            Op::Delete { key } => {
                if let Some(prev_revision) = mod_revision(connection, key)? {
                    delete(connection, revision, key.clone(), prev_revision, events)?;
                }
            }
            Op::DeletePrefix { prefix } => {
                for (key, prev_revision) in keys_below(connection, prefix)? {
                    delete(connection, revision, key, prev_revision, events)?;
                }
            }
        }
    }
    if !events.is_empty() {
        counters.revision = revision;
    }
    Ok(Applied::Done(Commit::Committed { revision: counters.revision }))
}

fn mod_revision(connection: &Connection, key: &str) -> rusqlite::Result<Option<Revision>> {
    connection
        .prepare_cached("SELECT mod_revision FROM entry WHERE key = ?1")?
        .query_row([key.as_bytes()], |row| row.get(0).map(|n| Revision(unsigned(n))))
        .optional()
}

fn keys_below(connection: &Connection, prefix: &str) -> rusqlite::Result<Vec<(String, Revision)>> {
    let row = |row: &Row<'_>| Ok((text(row.get(0)?), Revision(unsigned(row.get(1)?))));
    match range_end(prefix) {
        Some(end) => connection
            .prepare_cached("SELECT key, mod_revision FROM entry WHERE key >= ?1 AND key < ?2 ORDER BY key")?
            .query_map(params![prefix.as_bytes(), end], row)?
            .collect(),
        None => {
            connection.prepare_cached("SELECT key, mod_revision FROM entry ORDER BY key")?.query_map([], row)?.collect()
        }
    }
}

fn put(
    connection: &Connection,
    revision: Revision,
    key: &str,
    value: &[u8],
    lease: Option<LeaseId>,
    events: &mut Vec<WatchEvent>,
) -> rusqlite::Result<()> {
    let (create, version): (i64, i64) = connection
        .prepare_cached(
            "INSERT INTO entry (key, value, create_revision, mod_revision, version, lease)
             VALUES (?1, ?2, ?3, ?3, 1, ?4)
             ON CONFLICT (key) DO UPDATE SET value = excluded.value, mod_revision = excluded.mod_revision,
                 version = version + 1, lease = excluded.lease
             RETURNING create_revision, version",
        )?
        .query_row(params![key.as_bytes(), value, signed(revision.0), lease.map(|l| signed(l.0))], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    connection
        .prepare_cached(
            "INSERT INTO history (revision, seq, key, value, create_revision, version, lease)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            signed(revision.0),
            signed(events.len() as u64),
            key.as_bytes(),
            value,
            create,
            version,
            lease.map(|l| signed(l.0))
        ])?;
    events.push(WatchEvent {
        revision,
        change: Change::Put(Entry {
            key: key.to_owned(),
            value: value.to_vec(),
            create_revision: Revision(unsigned(create)),
            mod_revision: revision,
            version: unsigned(version),
            lease,
        }),
    });
    Ok(())
}

fn delete(
    connection: &Connection,
    revision: Revision,
    key: String,
    prev_revision: Revision,
    events: &mut Vec<WatchEvent>,
) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key.as_bytes()])?;
    connection
        .prepare_cached("INSERT INTO history (revision, seq, key, prev_revision) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![signed(revision.0), signed(events.len() as u64), key.as_bytes(), signed(prev_revision.0)])?;
    events.push(WatchEvent { revision, change: Change::Delete { key, prev_revision } });
    Ok(())
}

/// Where a replay stands: after this event. Events of one revision are numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub revision: Revision,
    pub seq: i64,
}

/// A piece of history.
pub(super) enum Page {
    /// Events with their positions; fewer than asked for means that `until` was reached.
    Events(Vec<(Position, WatchEvent)>),
    /// History now begins after the position.
    Compacted { oldest: Revision },
}

/// At most `limit` events after `after`, up to and including revision `until`.
pub(super) fn replay(
    connection: &mut Connection,
    prefix: &str,
    after: Position,
    until: Revision,
    limit: usize,
) -> rusqlite::Result<Page> {
    let snapshot = connection.transaction()?;
    let oldest = counters(&snapshot)?.oldest;
    if after.revision < oldest && until >= after.revision {
        return Ok(Page::Compacted { oldest });
    }
    let end = range_end(prefix);
    let mut statement = snapshot.prepare_cached(
        "SELECT revision, seq, key, value, create_revision, version, lease, prev_revision FROM history
         WHERE (revision, seq) > (?1, ?2) AND revision <= ?3 AND key >= ?4 AND (?5 IS NULL OR key < ?5)
         ORDER BY revision, seq LIMIT ?6",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = statement.query_map(
        params![signed(after.revision.0), after.seq, signed(until.0), prefix.as_bytes(), end, limit],
        |row| {
            let revision = Revision(unsigned(row.get(0)?));
            let position = Position { revision, seq: row.get(1)? };
            let key = text(row.get(2)?);
            let change = match row.get::<_, Option<Vec<u8>>>(3)? {
                Some(value) => Change::Put(Entry {
                    key,
                    value,
                    create_revision: Revision(unsigned(row.get(4)?)),
                    mod_revision: revision,
                    version: unsigned(row.get(5)?),
                    lease: row.get::<_, Option<i64>>(6)?.map(|id| LeaseId(unsigned(id))),
                }),
                None => Change::Delete { key, prev_revision: Revision(unsigned(row.get(7)?)) },
            };
            Ok((position, WatchEvent { revision, change }))
        },
    )?;
    Ok(Page::Events(rows.collect::<rusqlite::Result<_>>()?))
}

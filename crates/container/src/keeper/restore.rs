//! Receiving a container that was frozen and dumped on another host: the keeper starts CRIU, so
//! the restored pid 1 is the keeper's child, and stops CRIU twice to hear the agent's word: when
//! the network namespace is there, and when everything is restored and nothing runs.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use godwit_criu::{
    CgroupRoot, Criu, Directories, Ends, ExternalMount, Message, PassedFd, RestoreOptions, Session, StdioPipe, Version,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::launch::{OutputPipes, output_pipes};
use super::protocol::{Event, Reply, RestoreSpec};
use super::run::{Init, Keeper};
use super::state::{Phase, unix_ms_now};
use super::{chain, note};
use crate::cgroup::Cgroup;
use crate::mounts;
use crate::spec::Resources;
use crate::sys;

// Numbers under which criu finds what it is given.
const STDOUT_FD: i32 = 12;
const STDERR_FD: i32 = 13;

/// What a process may take beyond its own while it is restored, in bytes: it begins as a copy of criu, in the container's
/// cgroup. A thousand processes took more than 4 GiB.
const BYTES_PER_PROCESS: u64 = 16 << 20;

/// CRIU at work for this container.
pub struct Restoring {
    session: Session,
    output: Option<OutputPipes>,
    cgroup: Cgroup,
    /// It has been told what to restore.
    requested: bool,
    /// CRIU stands at a point where the agent has to speak.
    waiting: bool,
}

impl Restoring {
    pub fn fd(&self) -> BorrowedFd<'_> {
        // The socket closes only when the session is dropped.
        #[allow(clippy::expect_used)]
        self.session.fd().expect("the session is open while it is held")
    }

    /// A child has been waited for; it may have been criu.
    pub fn reaped(&mut self, pid: u32) {
        if self.session.pid() == pid {
            self.session.reaped();
        }
    }
}

impl Keeper {
    /// Starts criu and everything it needs, ahead of time.
    pub(super) fn prepare_restore(&mut self, criu: &Path) -> Result<Reply, String> {
        if self.state.phase != Phase::New {
            return Err(format!("the container is {:?} already", self.state.phase));
        }
        mounts::prepare_sources(&self.dir, self.spec.id_base).map_err(|e| chain(&e))?;
        let cgroup =
            Cgroup::create(&self.spec.cgroup_parent, &self.spec.id, &self.spec.resources).map_err(|e| chain(&e))?;
        let (output, [stdout, stderr]) = output_pipes(&self.spec).map_err(|e| chain(&e))?;
        let passed = [(STDOUT_FD, stdout), (STDERR_FD, stderr)].map(|(number, fd)| PassedFd { number, fd });
        let criu = Criu { path: criu.to_owned(), version: Version::MINIMUM };
        let session = Session::start(&criu, passed.into(), Ends::Killed).map_err(|e| chain(&e))?;
        self.restoring = Some(Restoring { session, output: Some(output), cgroup, requested: false, waiting: false });
        self.state.phase = Phase::Restoring;
        self.save_state();
        Ok(Reply::Done)
    }

    pub(super) fn restore(&mut self, from: &RestoreSpec) -> Result<Reply, String> {
        if self.state.phase == Phase::New {
            self.prepare_restore(&from.criu)?;
        }
        let restoring = self.restoring.as_mut().filter(|r| !r.requested);
        let restoring = restoring.ok_or_else(|| format!("the container is {:?} already", self.state.phase))?;
        let pipe = |inode: Option<u64>, fd| inode.map(|inode| StdioPipe { inode, fd });
        let options = RestoreOptions {
            directories: Directories { images: from.images_dir.clone(), work: from.work_dir.clone() },
            root: self.spec.rootfs.clone(),
            external_mounts: mounts::external_mounts(&self.spec, &self.dir)
                .into_iter()
                .map(|m| ExternalMount { target: m.target_in_container, source: m.source_on_host })
                .collect(),
            stdio: [pipe(from.stdout_pipe, STDOUT_FD), pipe(from.stderr_pipe, STDERR_FD)]
                .into_iter()
                .flatten()
                .collect(),
            cgroups: cgroup_roots(&restoring.cgroup),
            lazy_pages: from.lazy_pages,
        };
        if let Some(limit) = self.spec.resources.memory_bytes {
            let more = processes_in(&from.images_dir).saturating_mul(BYTES_PER_PROCESS);
            let with_room = Resources { memory_bytes: Some(limit.saturating_add(more)), ..self.spec.resources };
            restoring.cgroup.set(&with_room).map_err(|e| chain(&e))?;
        }
        restoring.session.request_restore(&options).map_err(|e| chain(&e))?;
        restoring.requested = true;
        Ok(Reply::Done)
    }

    /// The agent's word at a point where CRIU stands; that it is off is heard at any time, for CRIU may wait for
    /// something that does not come.
    pub(super) fn restore_proceed(&mut self, go_on: bool) -> Result<Reply, String> {
        if !go_on && self.restoring.as_ref().is_some_and(|r| !r.waiting) {
            self.give_up_restore();
            self.tell(Event::RestoreFailed { error: "the restore was called off".to_owned() });
            return Ok(Reply::Done);
        }
        if go_on {
            self.check_lease()?;
        }
        let restoring = self.restoring.as_mut().filter(|r| r.waiting);
        let restoring = restoring.ok_or("no restore waits for a word")?;
        restoring.waiting = false;
        restoring.session.proceed(go_on).map_err(|e| chain(&e))?;
        Ok(Reply::Done)
    }

    /// CRIU said something.
    pub(super) fn hear_criu(&mut self) {
        let Some(restoring) = &mut self.restoring else { return };
        let heard = match restoring.session.receive() {
            Ok(Message::Notify { script, pid }) => match (script.as_str(), pid) {
                ("setup-namespaces", Some(pid)) => {
                    restoring.waiting = true;
                    self.tell(Event::RestoreNetwork { pid: pid.unsigned_abs() });
                    Ok(())
                }
                ("post-restore", Some(pid)) => self.restored(pid.unsigned_abs()),
                _ => restoring.session.proceed(true).map_err(|e| chain(&e)),
            },
            Ok(Message::Restored { pid }) => {
                self.resumed(pid.unsigned_abs());
                Ok(())
            }
            Ok(other) => Err(format!("criu said {other:?} in the middle of a restore")),
            Err(error) => Err(chain(&error)),
        };
        if let Err(error) = heard {
            note(&format!("the restore failed: {error}"));
            self.give_up_restore();
            self.tell(Event::RestoreFailed { error });
        }
    }

    fn restored(&mut self, pid: u32) -> Result<(), String> {
        let Some(restoring) = &mut self.restoring else { return Ok(()) };
        let raw = Pid::from_raw(pid.cast_signed()).ok_or("criu named no process")?;
        let pidfd =
            pidfd_open(raw, PidfdFlags::empty()).map_err(|e| format!("cannot hold the restored process {pid}: {e}"))?;
        mounts::set_restored_attributes(&self.spec, &self.dir, pidfd.as_fd()).map_err(|e| chain(&e))?;
        // Nothing of criu is left in the processes.
        restoring.cgroup.set(&self.spec.resources).map_err(|e| chain(&e))?;
        restoring.waiting = true;
        let cgroup = restoring.cgroup.clone();
        if let Some(output) = restoring.output.take() {
            self.state.stdout_pipe = Some(output.stdout_inode);
            self.state.stderr_pipe = Some(output.stderr_inode);
            self.output = [Some(output.stdout), Some(output.stderr)];
        }
        self.init = Some(Init { pid, pidfd, cgroup, sync: None });
        self.state.phase = Phase::Restored;
        self.state.pid = Some(pid);
        self.state.pid_start_ticks = sys::start_time_ticks(pid).ok();
        self.state.created_unix_ms = Some(unix_ms_now());
        self.save_state();
        self.tell(Event::Restored { pid });
        Ok(())
    }

    fn resumed(&mut self, pid: u32) {
        self.state.phase = Phase::Running;
        self.state.started_unix_ms = Some(unix_ms_now());
        self.tell(Event::Resumed { pid });
        self.restoring = None;
        self.save_state();
    }

    /// Ends CRIU and everything it has made of the container.
    pub(super) fn give_up_restore(&mut self) {
        let Some(restoring) = self.restoring.take() else { return };
        let cgroup = restoring.cgroup.clone();
        // CRIU's helpers wait for each other, and what it makes of the container is in the keepers' cgroup at first.
        kill_descendants();
        drop(restoring);
        if let Err(error) = cgroup.kill_all() {
            note(&format!("processes of a failed restore may be left: {}", chain(&error)));
        }
        if self.init.is_none() {
            self.state.phase = Phase::New;
            self.save_state();
        }
    }
}

/// Processes in the images of a dump: each has its file `core-PID.img`, and each of its threads too.
fn processes_in(images: &Path) -> u64 {
    let files = std::fs::read_dir(images).into_iter().flatten().flatten();
    files.filter(|file| file.file_name().to_string_lossy().starts_with("core-")).count() as u64
}

/// Kills all processes below this one. Looked up while their parents live, and again for what was made meanwhile.
fn kill_descendants() {
    const MAX_ROUNDS: usize = 8;
    let mut killed = HashSet::new();
    for _ in 0..MAX_ROUNDS {
        let new: Vec<u32> = descendants().into_iter().filter(|pid| !killed.contains(pid)).collect();
        if new.is_empty() {
            return;
        }
        for pid in new {
            if let Some(raw) = Pid::from_raw(pid.cast_signed()) {
                // It may have ended by itself.
                let _ = kill_process(raw, Signal::KILL);
            }
            killed.insert(pid);
        }
    }
}

/// All processes below this one, as far as the kernel tells (CONFIG_PROC_CHILDREN, which CRIU wants too).
fn descendants() -> Vec<u32> {
    const MAX_PROCESSES: usize = 100_000;
    let mut found = children(std::process::id());
    let mut at = 0;
    while at < found.len() && found.len() < MAX_PROCESSES {
        found.extend(children(found[at]));
        at += 1;
    }
    found
}

fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u32>>()).collect()
}

/// Every hierarchy's place for the restored processes, instead of the places they had where they were dumped.
fn cgroup_roots(cgroup: &Cgroup) -> Vec<CgroupRoot> {
    let path = cgroup.path().to_owned();
    let controllers = cgroup.version_1_controllers();
    if controllers.is_empty() {
        return vec![CgroupRoot { controller: None, path }];
    }
    controllers.into_iter().map(|name| CgroupRoot { controller: Some(name), path: path.clone() }).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn grandchildren_are_found() {
        let mut shell = std::process::Command::new("sh").args(["-c", "sleep 1000; true"]).spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while children(shell.id()).is_empty() {
            assert!(std::time::Instant::now() < deadline, "no child of the shell is told");
            std::thread::yield_now();
        }
        let below = descendants();
        assert!(below.contains(&shell.id()) && below.contains(&children(shell.id())[0]), "{below:?}");
        for pid in children(shell.id()).into_iter().chain([shell.id()]) {
            kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
        }
        shell.wait().unwrap();
    }

    #[test]
    fn version_2_has_one_place_for_all() {
        let hierarchies = crate::cgroup::Hierarchies::v2_at(std::path::Path::new("/x"));
        let cgroup = Cgroup::open_in("/godwit/a", hierarchies).unwrap();
        assert_eq!(cgroup_roots(&cgroup), [CgroupRoot { controller: None, path: "/godwit/a".into() }]);
    }
}

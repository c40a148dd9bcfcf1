//! The dump of a frozen container: CRIU by RPC, pages into a socket, the rest into files.

use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_api::types::ErrorBody;
use godwit_container::{Cgroup, LaunchSpec, RootFs, external_mounts, remove_dir_all_no_xdev};
use godwit_criu::{Criu, Directories, DumpOptions, Ends, ExternalMount, Message, PassedFd, Session};
use godwit_memory::PageFilter;
use godwit_model::MoveId;

use crate::host::Host;

/// The number under which criu finds the page socket.
const PAGES_FD: i32 = 10;
/// A dump, memory included, takes at most this long, in milliseconds.
const DUMP_TIMEOUT_MS: u64 = 600_000;
/// Names a directory in which CRIU's logs of moves are kept (with `GODWIT_CRIU_LOG_LEVEL=4` they say when what was done).
const LOGS_VARIABLE: &str = "GODWIT_CRIU_LOGS";
/// Lines of CRIU's log that are told with an error.
const LOG_LINES: usize = 6;

/// CRIU's directories for one move, on a tmpfs.
#[derive(Debug, Clone)]
pub struct WorkDirs {
    pub top: PathBuf,
    pub images: PathBuf,
    pub work: PathBuf,
}

impl WorkDirs {
    /// Where they are, or would be.
    pub fn of(host: &Host, id: &MoveId) -> Self {
        Self::below(host.config.moves_dir().join(id.as_str()))
    }

    fn below(top: PathBuf) -> Self {
        Self { images: top.join("images"), work: top.join("work"), top }
    }

    /// Removes those of moves that ended with an earlier agent; `keep` are not over.
    pub fn sweep(host: &Host, keep: &[MoveId]) {
        for item in std::fs::read_dir(host.config.moves_dir()).into_iter().flatten().flatten() {
            let name = item.file_name();
            if keep.iter().any(|id| name == id.as_str()) {
                continue;
            }
            if let Err(error) = Self::below(item.path()).remove() {
                tracing::error!(%error, "an earlier move's working files are left behind");
            }
        }
    }

    /// Readable by the container's own processes: they open images themselves during a restore.
    pub fn make(host: &Host, id: &MoveId) -> Result<Self, std::io::Error> {
        let dirs = Self::of(host, id);
        for path in [&dirs.top, &dirs.images, &dirs.work] {
            DirBuilder::new().mode(0o755).recursive(true).create(path)?;
        }
        Ok(dirs)
    }

    pub fn for_criu(&self) -> Directories {
        Directories { images: self.images.clone(), work: self.work.clone() }
    }

    /// Removes everything, unmounting first what CRIU may have left.
    pub fn remove(&self) -> Result<(), String> {
        if !self.top.exists() {
            return Ok(());
        }
        self.keep_logs();
        RootFs { layers: Vec::new(), dir: self.top.clone() }
            .unmount()
            .map_err(|e| ErrorBody::from_chain(&e).one_line())?;
        remove_dir_all_no_xdev(&self.top).map_err(|e| ErrorBody::from_chain(&e).one_line())
    }

    /// Copies CRIU's logs where [`LOGS_VARIABLE`] says; for finding out where time goes.
    fn keep_logs(&self) {
        let Some(to) = std::env::var_os(LOGS_VARIABLE).map(PathBuf::from) else { return };
        let name = self.top.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for item in std::fs::read_dir(&self.work).into_iter().flatten().flatten() {
            let log = item.file_name().to_string_lossy().into_owned();
            if log.ends_with(".log")
                && let Err(error) = std::fs::copy(item.path(), to.join(format!("{name}-{log}")))
            {
                tracing::warn!(%error, log, "not kept");
            }
        }
    }

    /// The errors in one of CRIU's logs, else its last lines, for a message.
    pub fn errors_of(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.work.join(log)).unwrap_or_default();
        let harmless = |line: &&str| line.contains("RLIMIT_NOFILE");
        let said: Vec<&str> = text.lines().filter(|line| !harmless(line)).collect();
        let errors: Vec<&str> = said.iter().copied().filter(|line| line.contains("Error (")).collect();
        // CRIU does not always say what was wrong as an error.
        let told = if errors.is_empty() { said } else { errors };
        told[told.len().saturating_sub(LOG_LINES)..].join("; ")
    }
}

/// What is dumped, and how.
pub struct Dump<'a> {
    pub criu: &'a Criu,
    pub dirs: &'a WorkDirs,
    pub container_dir: &'a Path,
    pub launch: &'a LaunchSpec,
    pub cgroup: &'a Cgroup,
    pub pid: u32,
}

/// A criu that has everything to begin a dump and waits for the word.
pub struct BegunDump {
    session: Session,
    dirs: WorkDirs,
}

impl Dump<'_> {
    /// Starts criu, which looks at what the kernel can do and stops there: nothing of the container has been touched.
    /// Memory goes into `pages`, or past criu, which leaves out what `filter` lists. Blocks.
    pub fn begin(&self, pages: Option<OwnedFd>, filter: Option<&PageFilter>) -> Result<BegunDump, ErrorBody> {
        let freezer =
            self.cgroup.freezer_directory().ok_or_else(|| ErrorBody::new("this host has no freezer cgroup"))?;
        let options = DumpOptions {
            pid: self.pid.cast_signed(),
            directories: self.dirs.for_criu(),
            freeze_cgroup: freezer,
            external_mounts: external_mounts(self.launch, self.container_dir)
                .into_iter()
                .map(|m| ExternalMount { target: m.target_in_container, source: m.source_on_host })
                .collect(),
            root: self.launch.rootfs.clone(),
            page_server_fd: pages.is_some().then_some(PAGES_FD),
        };
        let passed = pages.into_iter().map(|fd| PassedFd { number: PAGES_FD, fd }).collect();
        let environment = filter.map(PageFilter::environment);
        let environment = environment.as_ref().map_or(&[][..], |e| &e[..]);
        let session = Session::start_with(self.criu, passed, Ends::Undone, environment);
        let mut begun = BegunDump { session: session.map_err(|e| ErrorBody::from_chain(&e))?, dirs: self.dirs.clone() };
        begun.session.request_dump(&options).map_err(|e| ErrorBody::from_chain(&e))?;
        match begun.session.receive_within(Duration::from_millis(DUMP_TIMEOUT_MS)) {
            Ok(Message::Notify { script, .. }) if script == "pre-dump" => Ok(begun),
            Ok(other) => Err(ErrorBody::new(format!("criu said {other:?} at the beginning of a dump"))),
            Err(error) => Err(begun.explain(&error)),
        }
    }
}

impl BegunDump {
    /// The process of criu; ours until this is dropped.
    pub fn pid(&self) -> u32 {
        self.session.pid()
    }

    /// Dumps and leaves everything as it was: frozen. Blocks.
    pub fn finish(self) -> Result<(), ErrorBody> {
        let run = || -> Result<(), godwit_criu::SessionError> {
            self.session.proceed(true)?;
            loop {
                match self.session.receive_within(Duration::from_millis(DUMP_TIMEOUT_MS))? {
                    Message::Notify { script, .. } => {
                        godwit_hold::stop_at(&format!("dump-{script}"));
                        self.session.proceed(true)?;
                    }
                    Message::Dumped => return Ok(()),
                    other => tracing::warn!(?other, "criu said something odd in the middle of a dump"),
                }
            }
        };
        run().map_err(|e| self.explain(&e))
    }

    fn explain(&self, error: &godwit_criu::SessionError) -> ErrorBody {
        let mut error = ErrorBody::from_chain(error);
        let said = self.dirs.errors_of("dump.log");
        if !said.is_empty() {
            error.causes.push(said);
        }
        error
    }
}

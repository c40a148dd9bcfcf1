//! When a client ends.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a client works: whichever of the two comes first; at least one is needed.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Until {
    /// Work for this many seconds
    #[arg(long, group = "end")]
    pub seconds: Option<f64>,
    /// Work until standard input is closed
    #[arg(long, group = "end")]
    pub until_stdin_closes: bool,
}

/// The running clock of an [`Until`].
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    deadline: Option<Instant>,
    closed: Arc<AtomicBool>,
}

impl Until {
    pub(crate) fn start(&self) -> Stop {
        let closed = Arc::new(AtomicBool::new(false));
        if self.until_stdin_closes {
            let closed = closed.clone();
            // Ends with the process, or with standard input.
            std::thread::spawn(move || {
                let mut ignored = [0; 256];
                while std::io::stdin().read(&mut ignored).is_ok_and(|n| n > 0) {}
                closed.store(true, Ordering::Relaxed);
            });
        }
        // Far beyond any test, and safe to add to any clock.
        let longest = 1e9;
        let deadline = self.seconds.map(|s| Instant::now() + Duration::from_secs_f64(s.clamp(0.0, longest)));
        Stop { deadline, closed }
    }
}

impl Stop {
    pub fn now(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || self.deadline.is_some_and(|d| Instant::now() >= d)
    }
}
